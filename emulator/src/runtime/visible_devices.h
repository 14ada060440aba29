// Which of the machine's devices ASCEND_RT_VISIBLE_DEVICES leaves to this process, and under which numbers.
#pragma once

#include <string>
#include <vector>

#include "runtime/runtime.h"

namespace cann {

struct VisibleDevices {
    std::vector<int32_t> numbers;  // the machine's, by the process's own
    std::string wrong;             // why there are none, else empty
};

// Read once, as CANN does. Numbers are separated by commas and ascend; what follows the first other character or the
// first number that the machine does not have is not read.
const VisibleDevices& visible_devices();

}  // namespace cann
