// What kernels need to know of the process' settings.
#pragma once

#include <atomic>

namespace cann {

// True when results beyond the dtype's range become its largest value, false when they become infinity.
bool saturates();

// Kernels set this when a result left the range of its dtype; aclrtGetOverflowStatus reports it.
extern std::atomic<bool> overflowed;

}  // namespace cann
