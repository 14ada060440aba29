#include "ops/tensor.h"

#include <c10/util/strides.h>

#include <algorithm>
#include <array>
#include <numeric>

namespace cann {
namespace {

struct Type {
    aclDataType acl;
    at::ScalarType torch;
    const char* name;
};

constexpr std::array<Type, 18> kTypes{{
    {ACL_FLOAT, at::kFloat, "float32"},
    {ACL_FLOAT16, at::kHalf, "float16"},
    {ACL_BF16, at::kBFloat16, "bfloat16"},
    {ACL_DOUBLE, at::kDouble, "float64"},
    {ACL_INT8, at::kChar, "int8"},
    {ACL_UINT8, at::kByte, "uint8"},
    {ACL_INT16, at::kShort, "int16"},
    {ACL_INT32, at::kInt, "int32"},
    {ACL_INT64, at::kLong, "int64"},
    {ACL_UINT16, at::kUInt16, "uint16"},
    {ACL_UINT32, at::kUInt32, "uint32"},
    {ACL_UINT64, at::kUInt64, "uint64"},
    {ACL_BOOL, at::kBool, "bool"},
    {ACL_COMPLEX64, at::kComplexFloat, "complex64"},
    {ACL_COMPLEX128, at::kComplexDouble, "complex128"},
    {ACL_COMPLEX32, at::kComplexHalf, "complex32"},
    {ACL_FLOAT8_E5M2, at::kFloat8_e5m2, "float8_e5m2"},
    {ACL_FLOAT8_E4M3FN, at::kFloat8_e4m3fn, "float8_e4m3fn"},
}};

template <class Matches>
const Type& find_type(Matches matches, int code) {
    for (const Type& type : kTypes) {
        if (matches(type)) return type;
    }
    TORCH_CHECK(false, "data type ", code, " is not emulated");
}

constexpr int64_t kRows = 16;  // of a fractal, the block that the matrix unit reads
int64_t columns_of_fractal(at::ScalarType dtype) { return c10::elementSize(dtype) == 1 ? 32 : 16; }
int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Zero-pads the last dimensions of `tensor` to multiples of rows and columns.
at::Tensor pad_to(const at::Tensor& tensor, int64_t rows, int64_t columns) {
    const int64_t right = blocks(tensor.size(-1), columns) * columns - tensor.size(-1);
    const int64_t bottom = blocks(tensor.size(-2), rows) * rows - tensor.size(-2);
    return at::constant_pad_nd(tensor, {0, right, 0, bottom});
}

[[noreturn]] void unknown_format(int format) {
    TORCH_CHECK(false, "private format ", format_name(format), " is not emulated");
}

}  // namespace

at::ScalarType from_acl(aclDataType type) {
    return find_type([=](const Type& t) { return t.acl == type; }, type).torch;
}

aclDataType to_acl(at::ScalarType type) {
    return find_type([=](const Type& t) { return t.torch == type; }, static_cast<int>(type)).acl;
}

const char* dtype_name(at::ScalarType type) {
    return find_type([=](const Type& t) { return t.torch == type; }, static_cast<int>(type)).name;
}

std::string format_name(int format) {
    switch (format) {
        case ACL_FORMAT_ND: return "ND";
        case ACL_FORMAT_NCL: return "NCL";
        case ACL_FORMAT_NCHW: return "NCHW";
        case ACL_FORMAT_NHWC: return "NHWC";
        case ACL_FORMAT_NCDHW: return "NCDHW";
        case ACL_FORMAT_NC1HWC0: return "NC1HWC0";
        case ACL_FORMAT_FRACTAL_Z: return "FRACTAL_Z";
        case ACL_FORMAT_FRACTAL_NZ: return "FRACTAL_NZ";
        default: return "format " + std::to_string(format);
    }
}

bool is_private(int format) {
    return format == ACL_FORMAT_NC1HWC0 || format == ACL_FORMAT_FRACTAL_Z || format == ACL_FORMAT_FRACTAL_NZ;
}

size_t TensorArgument::bytes() const { return c10::multiply_integers(sizes) * c10::elementSize(dtype); }

at::Tensor TensorArgument::read() const {
    if (!is_private(format)) return at::from_blob(const_cast<char*>(begin()), sizes, strides, dtype);
    // A view may have swapped dimensions (the transposed weight of a linear layer); what is stored did not change.
    std::vector<int64_t> order(sizes.size()), inverse(sizes.size()), stored_sizes;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](int64_t a, int64_t b) { return strides[a] > strides[b]; });
    for (size_t i = 0; i < order.size(); ++i) {
        inverse[order[i]] = static_cast<int64_t>(i);
        stored_sizes.push_back(sizes[order[i]]);
    }
    const auto expected = c10::contiguous_strides(stored_sizes);
    for (size_t i = 0; i < order.size(); ++i) {
        TORCH_CHECK(offset == 0 && (stored_sizes[i] == 1 || strides[order[i]] == expected[i]),
                    "a slice of a tensor in the format ", format_name(format), " cannot be read");
    }
    return unpack(at::from_blob(data, storage_sizes, dtype), stored_sizes, format).permute(inverse);
}

namespace {

// The sizes as [N, C, H, W]: as torch_npu has it, fewer than four begin at the channels.
std::vector<int64_t> as_image(at::IntArrayRef sizes, int format) {
    if (sizes.size() > 4) unknown_format(format);
    std::vector<int64_t> image{1, 1, 1, 1};
    std::copy(sizes.begin(), sizes.end(), image.begin() + (sizes.size() == 4 ? 0 : 1));
    return image;
}

}  // namespace

std::vector<int64_t> private_sizes(at::IntArrayRef sizes, int format, at::ScalarType dtype) {
    const int64_t columns = columns_of_fractal(dtype);
    const size_t rank = sizes.size();
    if (format == ACL_FORMAT_FRACTAL_NZ && rank >= 2) {
        std::vector<int64_t> stored(sizes.begin(), sizes.end() - 2);
        for (int64_t size : {blocks(sizes[rank - 1], columns), blocks(sizes[rank - 2], kRows), kRows, columns}) {
            stored.push_back(size);
        }
        return stored;
    }
    if (format != ACL_FORMAT_FRACTAL_Z && format != ACL_FORMAT_NC1HWC0) unknown_format(format);
    const auto image = as_image(sizes, format);
    if (format == ACL_FORMAT_FRACTAL_Z) {
        return {blocks(image[1], columns) * image[2] * image[3], blocks(image[0], kRows), kRows, columns};
    }
    return {image[0], blocks(image[1], columns), image[2], image[3], columns};
}

at::Tensor pack(const at::Tensor& logical, int format) {
    const int64_t columns = columns_of_fractal(logical.scalar_type());
    const auto stored = private_sizes(logical.sizes(), format, logical.scalar_type());
    if (format == ACL_FORMAT_FRACTAL_NZ) {
        const at::Tensor padded = pad_to(logical, kRows, columns);
        const at::Tensor split = padded.unflatten(-1, {-1, columns}).unflatten(-3, {-1, kRows});
        return split.movedim(-2, -4).contiguous();  // [..., M1, 16, N1, C0] to [..., N1, M1, 16, C0]
    }
    const at::Tensor image = logical.reshape(as_image(logical.sizes(), format));
    if (format == ACL_FORMAT_FRACTAL_Z) {
        const at::Tensor padded = pad_to(image.permute({2, 3, 0, 1}), kRows, columns);  // [H, W, N, C]
        const at::Tensor split = padded.unflatten(-1, {-1, columns}).unflatten(2, {-1, kRows});
        return split.permute({4, 0, 1, 2, 3, 5}).contiguous().view(stored);
    }
    const at::Tensor padded = pad_to(image.permute({0, 2, 3, 1}), 1, columns);  // [N, H, W, C]
    return padded.unflatten(-1, {-1, columns}).permute({0, 3, 1, 2, 4}).contiguous();
}

at::Tensor unpack(const at::Tensor& stored, at::IntArrayRef sizes, int format) {
    const int64_t columns = columns_of_fractal(stored.scalar_type());
    const auto expected = private_sizes(sizes, format, stored.scalar_type());
    const at::Tensor blocks_ = stored.view(expected);
    if (format == ACL_FORMAT_FRACTAL_NZ) {
        const at::Tensor padded = blocks_.movedim(-4, -2).flatten(-4, -3).flatten(-2, -1);
        return padded.narrow(-2, 0, sizes[sizes.size() - 2]).narrow(-1, 0, sizes[sizes.size() - 1]).contiguous();
    }
    const auto image = as_image(sizes, format);
    if (format == ACL_FORMAT_FRACTAL_Z) {
        const at::Tensor split = blocks_.view({blocks(image[1], columns), image[2], image[3], -1, kRows, columns});
        const at::Tensor padded = split.permute({3, 4, 0, 5, 1, 2}).flatten(2, 3).flatten(0, 1);  // [N, C, H, W]
        return padded.narrow(0, 0, image[0]).narrow(1, 0, image[1]).reshape(sizes);
    }
    return blocks_.permute({0, 1, 4, 2, 3}).flatten(1, 2).narrow(1, 0, image[1]).reshape(sizes);
}

}  // namespace cann

using namespace cann;

CANN_API aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t rank, aclDataType type, const int64_t* strides,
                                    int64_t offset, aclFormat format, const int64_t* storage_sizes,
                                    uint64_t storage_rank, void* data) {
    try {
        auto argument = std::make_shared<TensorArgument>();
        argument->dtype = from_acl(type);
        argument->sizes.assign(sizes, sizes + rank);
        argument->strides.assign(strides, strides + rank);
        argument->offset = offset;
        argument->format = format;
        argument->storage_sizes.assign(storage_sizes, storage_sizes + storage_rank);
        argument->data = static_cast<char*>(data);
        return new aclTensor{std::move(argument)};
    } catch (const std::exception& error) {
        fail(ACL_ERROR_INVALID_PARAM, "aclCreateTensor: %s", error.what());
        return nullptr;
    }
}

CANN_API int aclDestroyTensor(const aclTensor* tensor) {
    delete tensor;
    return 0;
}

// The caller frees `*sizes` with delete[].
CANN_API int aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* rank) {
    const auto& shape = tensor->argument->sizes;
    *sizes = new int64_t[shape.size()];
    std::copy(shape.begin(), shape.end(), *sizes);
    *rank = shape.size();
    return 0;
}

namespace {

template <class T>
at::Scalar load(const void* value) {
    return at::Scalar(*static_cast<const T*>(value));
}

}  // namespace

CANN_API aclScalar* aclCreateScalar(void* value, aclDataType type) {
    switch (type) {
        case ACL_DOUBLE: return new aclScalar{load<double>(value)};
        case ACL_FLOAT: return new aclScalar{load<float>(value)};
        case ACL_FLOAT16: return new aclScalar{load<at::Half>(value)};
        case ACL_BF16: return new aclScalar{load<at::BFloat16>(value)};
        case ACL_INT64: return new aclScalar{load<int64_t>(value)};
        case ACL_INT32: return new aclScalar{load<int32_t>(value)};
        case ACL_BOOL: return new aclScalar{load<bool>(value)};
        case ACL_COMPLEX64: return new aclScalar{load<c10::complex<float>>(value)};
        case ACL_COMPLEX128: return new aclScalar{load<c10::complex<double>>(value)};
        default:
            fail(ACL_ERROR_INVALID_PARAM, "aclCreateScalar: data type %d is not emulated", static_cast<int>(type));
            return nullptr;
    }
}

CANN_API int aclDestroyScalar(const aclScalar* scalar) {
    delete scalar;
    return 0;
}

#define ARRAY(NAME, T)                                                               \
    CANN_API acl##NAME* aclCreate##NAME(const T* values, uint64_t count) {           \
        return new acl##NAME{std::vector<T>(values, values + count)};                \
    }                                                                                \
    CANN_API int aclDestroy##NAME(const acl##NAME* array) {                          \
        delete array;                                                                \
        return 0;                                                                    \
    }
ARRAY(IntArray, int64_t)
ARRAY(FloatArray, float)
ARRAY(BoolArray, bool)
#undef ARRAY

CANN_API aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t count) {
    return new aclTensorList{{tensors, tensors + count}};
}

CANN_API int aclDestroyTensorList(const aclTensorList* list) {
    for (const aclTensor* tensor : list->tensors) delete tensor;
    delete list;
    return 0;
}

CANN_API aclScalarList* aclCreateScalarList(const aclScalar* const* scalars, uint64_t count) {
    return new aclScalarList{{scalars, scalars + count}};
}

CANN_API int aclDestroyScalarList(const aclScalarList* list) {
    for (const aclScalar* scalar : list->scalars) delete scalar;
    delete list;
    return 0;
}
