// The argument objects of aclnn (aclCreateTensor and its kin), and the private formats of a chip's matrix unit.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <vector>

#include "runtime/runtime.h"

namespace cann {

at::ScalarType from_acl(aclDataType type);  // throws for a type that torch does not have
aclDataType to_acl(at::ScalarType type);
const char* dtype_name(at::ScalarType type);  // "float16", as in the chip profiles
std::string format_name(int format);

// One tensor of device memory: what it looks like (sizes, strides) and how it is stored (format, storage sizes).
struct TensorArgument {
    at::ScalarType dtype;
    std::vector<int64_t> sizes, strides;
    int64_t offset;  // elements from `data` to the first one
    aclFormat format;
    std::vector<int64_t> storage_sizes;
    char* data;

    size_t bytes() const;
    const char* begin() const { return data + offset * static_cast<int64_t>(c10::elementSize(dtype)); }
    // A CPU tensor: over the device memory itself, or for a private format a copy in the logical order.
    at::Tensor read() const;
};

bool is_private(int format);
// Storage sizes of a tensor of these logical sizes, [..., rows, columns] or [N, C, H, W]; throws for other formats.
std::vector<int64_t> private_sizes(at::IntArrayRef sizes, int format, at::ScalarType dtype);
at::Tensor pack(const at::Tensor& logical, int format);
at::Tensor unpack(const at::Tensor& stored, at::IntArrayRef sizes, int format);

}  // namespace cann

struct aclTensor {
    std::shared_ptr<cann::TensorArgument> argument;  // shared with launches that outlive aclDestroyTensor
};
struct aclScalar {
    at::Scalar value;
};
struct aclIntArray {
    std::vector<int64_t> values;
};
struct aclFloatArray {
    std::vector<float> values;
};
struct aclBoolArray {
    std::vector<bool> values;
};
struct aclTensorList {
    std::vector<const aclTensor*> tensors;  // owned
};
struct aclScalarList {
    std::vector<const aclScalar*> scalars;  // owned
};
