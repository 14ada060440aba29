// The descriptors that the old operator interface and offline models share.
#pragma once

#include <string>
#include <vector>

#include "runtime/runtime.h"

struct aclDataBuffer {
    void* data;
    size_t size;
};

struct aclTensorDesc {
    aclDataType type;
    aclFormat format;
    std::vector<int64_t> dims;
    std::vector<int64_t> storage_dims;
    aclFormat storage_format;
    aclMemType placement = ACL_MEMTYPE_DEVICE;
    std::string name;
};
