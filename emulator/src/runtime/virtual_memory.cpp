// Reserved addresses and physical pages apart from each other, which torch's expandable segments need. Physical
// memory is a memfd (counted against the chip's capacity) that aclrtMapMem maps over a reserved address range.
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <mutex>

#include "runtime/memory.h"

using namespace cann;

namespace {

struct Physical {
    int file;
    size_t size;
    int32_t device;
};

std::mutex guard;
std::map<void*, size_t> reserved;  // size of each reserved range: the call that gives it back has none

}  // namespace

CANN_API aclError aclrtReserveMemAddress(void** address, size_t size, size_t, void*, uint64_t) {
    *address = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*address == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "no %zu bytes of address space", size);
    std::lock_guard<std::mutex> lock(guard);
    reserved[*address] = size;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtReleaseMemAddress(void* address) {
    std::lock_guard<std::mutex> lock(guard);
    const auto found = reserved.find(address);
    if (found == reserved.end()) return fail(ACL_ERROR_INVALID_PARAM, "%p is not a reserved address", address);
    munmap(address, found->second);
    reserved.erase(found);
    return ACL_SUCCESS;
}

CANN_API aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t size, const aclrtPhysicalMemProp* properties,
                                      uint64_t) {
    const bool on_device = properties->location.type == ACL_MEM_LOCATION_TYPE_DEVICE;
    const int32_t device = on_device ? static_cast<int32_t>(properties->location.id) : kHost;
    if (on_device && !reserve_capacity(device, size)) {
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "device %d has not %zu bytes left", device, size);
    }
    const int file = memfd_create("cann-device-memory", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, static_cast<off_t>(size)) != 0) {
        if (on_device) release_capacity(device, size);
        if (file >= 0) close(file);
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "the emulating host gives no memory file of %zu bytes", size);
    }
    *handle = reinterpret_cast<aclrtDrvMemHandle>(new Physical{file, size, device});
    return ACL_SUCCESS;
}

CANN_API aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    auto* physical = reinterpret_cast<Physical*>(handle);
    if (physical->device != kHost) release_capacity(physical->device, physical->size);
    close(physical->file);
    delete physical;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtMapMem(void* address, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t) {
    auto* physical = reinterpret_cast<Physical*>(handle);
    if (offset + size > physical->size) return fail(ACL_ERROR_INVALID_PARAM, "the mapping is larger than its memory");
    void* mapped = mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->file,
                        static_cast<off_t>(offset));
    if (mapped == MAP_FAILED) return fail(ACL_ERROR_RT_FAILURE, "the host could not map %zu bytes", size);
    add_region({static_cast<char*>(address), size, physical->device});
    return ACL_SUCCESS;
}

CANN_API aclError aclrtUnmapMem(void* address) {
    Region region = remove_region(address, false);
    if (!region) region = remove_region(address, true);
    if (!region) return fail(ACL_ERROR_INVALID_PARAM, "%p is not mapped", address);
    // Back to a reserved range, so that a later use of the address faults instead of reading old data.
    mmap(address, region.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return ACL_SUCCESS;
}
