// Pinned host memory: ordinary memory that is registered, so that copies can tell it from pageable memory.
#include <cstdlib>

#include "runtime/memory.h"

using namespace cann;

namespace {

// ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED and ..._NOT_REGISTERED, which older headers do not have.
constexpr aclError kAlreadyRegistered = 507910, kNotRegistered = 507911;

}  // namespace

CANN_API aclError aclrtMallocHost(void** address, size_t size) {
    constexpr size_t kAlignment = 4096;
    *address = std::aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
    if (*address == nullptr) return fail(ACL_ERROR_BAD_ALLOC, "the host has not %zu bytes of memory", size);
    add_region({static_cast<char*>(*address), size, kHost});
    return ACL_SUCCESS;
}

CANN_API aclError aclrtFreeHost(void* address) {
    if (!remove_region(address, true)) {
        return fail(ACL_ERROR_INVALID_PARAM, "aclrtFreeHost of %p, which aclrtMallocHost did not return", address);
    }
    std::free(address);
    return ACL_SUCCESS;
}

// The device sees registered host memory at its own address: there is one address space.
CANN_API aclError aclrtHostRegister(void* address, uint64_t size, aclrtHostRegisterType, void** device_address) {
    if (find_region(address)) return fail(kAlreadyRegistered, "%p is registered", address);
    add_region({static_cast<char*>(address), size, kHost});
    *device_address = address;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtHostRegisterV2(void* address, uint64_t size, uint32_t) {
    void* unused;
    return aclrtHostRegister(address, size, ACL_HOST_REGISTER_MAPPED, &unused);
}

CANN_API aclError aclrtHostUnregister(void* address) {
    if (remove_region(address, true)) return ACL_SUCCESS;
    return fail(kNotRegistered, "%p is not registered", address);
}
