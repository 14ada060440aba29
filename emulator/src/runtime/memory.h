// Who owns an address: device memory of which device, pinned host memory, or plain host memory (not registered).
#pragma once

#include "runtime/runtime.h"

namespace cann {

constexpr int32_t kHost = -1;

struct Region {
    char* base = nullptr;
    size_t size = 0;
    int32_t device = kHost;

    explicit operator bool() const { return base != nullptr; }
    size_t after(const void* address) const { return size - (static_cast<const char*>(address) - base); }
};

// The registered region that holds `address`; an empty one for plain host memory.
Region find_region(const void* address);
void add_region(const Region& region);
// Removes the region that starts at `base` on the host (kHost) or on any device; an empty one if there is none.
Region remove_region(void* base, bool on_host);

// Whether operators of a device may use the memory of a device (or of kHost): their own, and peers' where enabled.
bool reaches(int32_t device, int32_t memory_of);

// Takes `size` bytes from a device's capacity; false when they are not there.
bool reserve_capacity(int32_t device, size_t size);
void release_capacity(int32_t device, size_t size);

}  // namespace cann
