// Device memory and its capacity. Pages come from mmap and are touched only when used, so a chip with more memory
// than the host can be emulated as long as the program does not fill it.
#include "runtime/memory.h"

#include <sys/mman.h>

#include <map>
#include <mutex>
#include <vector>

#include "races/check.h"
#include "runtime/stream.h"

namespace cann {
namespace {

std::mutex guard;
std::map<const char*, Region> regions;
std::map<int32_t, size_t> used;

constexpr size_t kPage = 4096;
size_t round_to_page(size_t size) { return (size + kPage - 1) / kPage * kPage; }

aclError allocate(void** address, size_t size) {
    const int32_t device = current_device();
    *address = nullptr;
    if (size == 0) return fail(ACL_ERROR_INVALID_PARAM, "aclrtMalloc of 0 bytes");
    const size_t bytes = round_to_page(size);
    if (!reserve_capacity(device, bytes)) {
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "device %d has not %zu bytes left of its %zu", device, size,
                    chip().memory);
    }
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) {
        release_capacity(device, bytes);
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "the emulating host has not %zu bytes of memory", size);
    }
    add_region({static_cast<char*>(pages), bytes, device});
    *address = pages;
    return ACL_SUCCESS;
}

}  // namespace

Region find_region(const void* address) {
    std::lock_guard<std::mutex> lock(guard);
    auto next = regions.upper_bound(static_cast<const char*>(address));
    if (next == regions.begin()) return {};
    const Region& region = std::prev(next)->second;
    return address < region.base + region.size ? region : Region{};
}

void add_region(const Region& region) {
    std::lock_guard<std::mutex> lock(guard);
    regions[region.base] = region;
}

Region remove_region(void* base, bool on_host) {
    std::unique_lock<std::mutex> lock(guard);
    const auto found = regions.find(static_cast<char*>(base));
    if (found == regions.end() || (found->second.device == kHost) != on_host) return {};
    const Region region = found->second;
    regions.erase(found);
    lock.unlock();
    races::forget(region);
    return region;
}

bool reserve_capacity(int32_t device, size_t size) {
    std::lock_guard<std::mutex> lock(guard);
    if (size > chip().memory - used[device]) return false;
    used[device] += size;
    return true;
}

void release_capacity(int32_t device, size_t size) {
    std::lock_guard<std::mutex> lock(guard);
    used[device] -= size;
}

}  // namespace cann

CANN_API aclError aclrtMalloc(void** address, size_t size, aclrtMemMallocPolicy) {
    return cann::allocate(address, size);
}

CANN_API aclError aclrtMallocAlign32(void** address, size_t size, aclrtMemMallocPolicy) {
    return cann::allocate(address, size);
}

CANN_API aclError aclrtFree(void* address) {
    const cann::Region region = cann::find_region(address);
    if (region.base != address || region.device == cann::kHost) {
        return cann::fail(ACL_ERROR_INVALID_PARAM, "aclrtFree of %p, which aclrtMalloc did not return", address);
    }
    cann::synchronize_device(region.device);  // aclrtFree waits for the work that may still use the memory
    cann::remove_region(address, false);
    munmap(region.base, region.size);
    cann::release_capacity(region.device, region.size);
    return ACL_SUCCESS;
}

CANN_API aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
    std::lock_guard<std::mutex> lock(cann::guard);
    *total = cann::chip().memory;
    *free = *total - cann::used[cann::current_device()];
    return ACL_SUCCESS;
}

CANN_API aclError aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* attributes) {
    const cann::Region region = cann::find_region(address);
    *attributes = {};
    attributes->pageSize = cann::kPage;
    if (!region) {
        attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    } else if (region.device == cann::kHost) {
        attributes->location.type = ACL_MEM_LOCATION_TYPE_HOST;
    } else {
        attributes->location = {static_cast<uint32_t>(region.device), ACL_MEM_LOCATION_TYPE_DEVICE};
    }
    return ACL_SUCCESS;
}
