// ONNX's tensors: the three places where their values may be, and what each dtype is packed into.
#include <fstream>

#include "graph/wire.h"
#include "offline/onnx_model.h"

namespace cann::offline {
namespace {

using graph::Ints;
using graph::Message;

struct External {
    std::string location;
    int64_t offset = 0, length = -1;  // -1: to the end
};

// The fields of a TensorProto; views into the message.
struct Fields {
    std::string name;
    Ints sizes, integers;  // of all dtypes that are stored as numbers of varying length
    int64_t dtype = 0, location = 0;
    bool has_raw = false;
    std::string_view raw;
    std::string numbers;  // of float and double, as stored
    External external;
};

External& read_entry(std::string_view bytes, External& external) {
    std::string key, value;
    for (Message message(bytes); message.read();) {
        if (message.field() == 1) key = message.text();
        if (message.field() == 2) value = message.text();
    }
    if (key == "location") external.location = value;
    if (key == "offset") external.offset = std::stoll(value);
    if (key == "length") external.length = std::stoll(value);
    return external;
}

Fields read_fields(std::string_view bytes) {
    Fields fields;
    for (Message message(bytes); message.read();) {
        switch (message.field()) {
            case 1: message.append_to(fields.sizes); break;
            case 2: fields.dtype = message.integer(); break;
            case 4:
            case 10: message.append_to(fields.numbers); break;
            case 5:
            case 7:
            case 11: message.append_to(fields.integers); break;
            case 8: fields.name = message.text(); break;
            case 9:
                fields.has_raw = true;
                fields.raw = message.bytes();
                break;
            case 13: read_entry(message.bytes(), fields.external); break;
            case 14: fields.location = message.integer(); break;
            default: break;
        }
    }
    return fields;
}

[[noreturn]] void refuse_size(const Fields& fields, size_t size, const at::Tensor& tensor) {
    throw Refusal("E10041", "Failed to load the model: the tensor " + fields.name + " has " + std::to_string(size) +
                                " bytes instead of " + std::to_string(tensor.nbytes()) + ".");
}

void copy(const Fields& fields, std::string_view bytes, const at::Tensor& tensor) {
    if (bytes.size() != tensor.nbytes()) refuse_size(fields, bytes.size(), tensor);
    if (!bytes.empty()) std::memcpy(tensor.data_ptr(), bytes.data(), bytes.size());
}

void read_file(const Fields& fields, const std::string& directory, const at::Tensor& tensor) {
    const External& external = fields.external;
    const std::string path = directory + "/" + external.location;
    std::ifstream file(path, std::ios::binary);
    if (directory.empty() || !file) throw Refusal("E10041", "Failed to load the model from " + path + ".");
    file.seekg(0, std::ios::end);
    const int64_t size = file.tellg(), wanted = static_cast<int64_t>(tensor.nbytes());
    const int64_t there = external.length >= 0 ? external.length : size - external.offset;
    if (there != wanted) refuse_size(fields, static_cast<size_t>(std::max<int64_t>(there, 0)), tensor);
    file.seekg(external.offset);
    file.read(static_cast<char*>(tensor.data_ptr()), wanted);
    if (!file) throw Refusal("E10041", "Failed to load the model from " + path + ": the file ends too early.");
}

// Halves are stored as the numbers that their bits make, all others as what they are.
void copy_integers(const Fields& fields, const at::Tensor& tensor) {
    const auto count = static_cast<size_t>(tensor.numel());
    if (fields.integers.size() != count) refuse_size(fields, fields.integers.size() * tensor.element_size(), tensor);
    for (size_t i = 0; i < count; ++i) {  // little endian, as this host and the device are
        const int64_t number = fields.integers[i];
        std::memcpy(static_cast<char*>(tensor.data_ptr()) + i * tensor.element_size(), &number, tensor.element_size());
    }
}

}  // namespace

std::optional<at::ScalarType> dtype_of_onnx(int64_t number) {
    switch (number) {
        case 1: return at::kFloat;
        case 2: return at::kByte;
        case 3: return at::kChar;
        case 4: return at::kUInt16;
        case 5: return at::kShort;
        case 6: return at::kInt;
        case 7: return at::kLong;
        case 9: return at::kBool;
        case 10: return at::kHalf;
        case 11: return at::kDouble;
        case 12: return at::kUInt32;
        case 13: return at::kUInt64;
        case 14: return at::kComplexFloat;
        case 15: return at::kComplexDouble;
        case 16: return at::kBFloat16;
        case 17: return at::kFloat8_e4m3fn;
        case 19: return at::kFloat8_e5m2;
        default: return std::nullopt;
    }
}

OnnxInitializer read_tensor(std::string_view serialized, const std::string& directory) {
    constexpr int64_t kExternal = 1;
    const Fields fields = read_fields(serialized);
    const auto dtype = dtype_of_onnx(fields.dtype);
    if (!dtype) {
        throw unsupported("the tensor " + fields.name + " is of ONNX's data type " + std::to_string(fields.dtype) +
                          ", which is not emulated");
    }
    const at::Tensor tensor = at::empty(fields.sizes, *dtype);
    if (fields.location == kExternal) {
        read_file(fields, directory, tensor);
    } else if (fields.has_raw) {
        copy(fields, fields.raw, tensor);
    } else if (!fields.numbers.empty()) {
        copy(fields, fields.numbers, tensor);
    } else {
        copy_integers(fields, tensor);
    }
    return {fields.name, tensor};
}

}  // namespace cann::offline
