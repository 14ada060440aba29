// A reader of protobuf's wire format, so that users need no protobuf library.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace cann::graph {

class Message {
public:
    explicit Message(std::string_view bytes) : next_(bytes.data()), end_(bytes.data() + bytes.size()) {}

    // Moves to the next field; false at the end.
    bool read() {
        if (next_ == end_) return false;
        const uint64_t key = varint();
        field_ = static_cast<int>(key >> 3);
        type_ = static_cast<int>(key & 7);
        switch (type_) {
            case kVarint: number_ = varint(); break;
            case kEightBytes: bytes_ = take(8); break;
            case kLength: bytes_ = take(varint()); break;
            case kFourBytes: bytes_ = take(4); break;
            default: throw std::runtime_error("the graph is no valid protobuf message");
        }
        return true;
    }

    int field() const { return field_; }
    int64_t integer() const { return static_cast<int64_t>(number_); }
    std::string_view bytes() const { return bytes_; }
    std::string text() const { return std::string(bytes_); }
    float real() const { return as_float(bytes_.data()); }

    // A repeated number comes packed into one field, or as a field each.
    void append_to(std::vector<int64_t>& values) const {
        if (type_ == kVarint) {
            values.push_back(integer());
            return;
        }
        for (Message packed(bytes_); packed.next_ != packed.end_;) {
            values.push_back(static_cast<int64_t>(packed.varint()));
        }
    }
    void append_to(std::vector<double>& values) const {
        for (size_t i = 0; i + 4 <= bytes_.size(); i += 4) values.push_back(as_float(bytes_.data() + i));
    }
    // The same for numbers of 4 or 8 bytes each, as they are stored.
    void append_to(std::string& bytes) const { bytes += bytes_; }

private:
    enum WireType { kVarint = 0, kEightBytes = 1, kLength = 2, kFourBytes = 5 };

    static float as_float(const char* bytes) {
        float value;
        std::memcpy(&value, bytes, sizeof value);
        return value;
    }

    uint64_t varint() {
        uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            const uint8_t byte = static_cast<uint8_t>(take(1)[0]);
            value |= static_cast<uint64_t>(byte & 0x7f) << shift;
            if (byte < 0x80) return value;
        }
        throw std::runtime_error("the graph has a number of more than 64 bits");
    }

    std::string_view take(size_t size) {
        if (size > static_cast<size_t>(end_ - next_)) throw std::runtime_error("the graph's bytes end too early");
        const std::string_view taken(next_, size);
        next_ += size;
        return taken;
    }

    const char *next_, *end_;
    int field_ = 0, type_ = kVarint;
    uint64_t number_ = 0;
    std::string_view bytes_;
};

}  // namespace cann::graph
