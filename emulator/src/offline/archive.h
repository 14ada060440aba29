// One description of a structure serves writing and reading it:
//
//     template <class Archive> void transfer(Archive& archive, Port& port) { archive(port.name, port.sizes); }
#pragma once

#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace cann::offline {

class Writer {
public:
    static constexpr bool kReads = false;

    template <class... Parts>
    void operator()(Parts&... parts) {
        (transfer(*this, parts), ...);
    }
    void bytes(void* data, size_t size) { text_.append(static_cast<const char*>(data), size); }
    std::string take() { return std::move(text_); }

private:
    std::string text_;
};

class Reader {
public:
    static constexpr bool kReads = true;

    explicit Reader(std::string_view text) : text_(text) {}

    template <class... Parts>
    void operator()(Parts&... parts) {
        (transfer(*this, parts), ...);
    }
    void bytes(void* data, size_t size) {
        if (size > text_.size()) throw std::runtime_error("the description ends too early");
        std::memcpy(data, text_.data(), size);
        text_.remove_prefix(size);
    }
    size_t left() const { return text_.size(); }

private:
    std::string_view text_;
};

template <class Archive, class T>
    requires(std::is_arithmetic_v<T> || std::is_enum_v<T>)
void transfer(Archive& archive, T& value) {
    archive.bytes(&value, sizeof value);
}

// The number of elements; no list has more of them than bytes are left.
template <class Archive>
size_t transfer_size(Archive& archive, size_t size) {
    uint64_t count = size;
    archive(count);
    if constexpr (Archive::kReads) {
        if (count > archive.left()) throw std::runtime_error("a list of the description is longer than the file");
    }
    return count;
}

template <class Archive>
void transfer(Archive& archive, std::string& text) {
    const size_t size = transfer_size(archive, text.size());
    if constexpr (Archive::kReads) text.resize(size);
    archive.bytes(text.data(), size);
}

template <class Archive, class T>
void transfer(Archive& archive, std::vector<T>& list) {
    const size_t size = transfer_size(archive, list.size());
    if constexpr (Archive::kReads) list.resize(size);
    for (T& element : list) archive(element);
}

template <class Archive, class T>
void transfer(Archive& archive, std::optional<T>& optional) {
    bool there = optional.has_value();
    archive(there);
    if constexpr (Archive::kReads) {
        if (there) optional.emplace();
    }
    if (there) archive(*optional);
}

template <class Archive, class T>
void transfer(Archive& archive, std::map<std::string, T>& map) {
    const size_t size = transfer_size(archive, map.size());
    if constexpr (Archive::kReads) {
        for (size_t i = 0; i < size; ++i) {
            std::string key;
            archive(key);
            archive(map[key]);
        }
    } else {
        for (auto& [key, value] : map) {
            std::string name = key;
            archive(name, value);
        }
    }
}

template <class Archive, size_t I = 0, class... Kinds>
void transfer_kind(Archive& archive, std::variant<Kinds...>& variant, size_t kind) {
    if constexpr (I < sizeof...(Kinds)) {
        if (kind != I) return transfer_kind<Archive, I + 1>(archive, variant, kind);
        if constexpr (Archive::kReads) variant.template emplace<I>();
        archive(std::get<I>(variant));
    } else {
        throw std::runtime_error("an attribute of an unknown kind");
    }
}

template <class Archive, class... Kinds>
void transfer(Archive& archive, std::variant<Kinds...>& variant) {
    uint64_t kind = variant.index();
    archive(kind);
    transfer_kind(archive, variant, kind);
}

template <class Archive>
void transfer(Archive&, std::monostate&) {}

}  // namespace cann::offline
