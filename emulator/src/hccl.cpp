// HCCL: only what torch_npu calls without a process group. torch_npu looks the collectives up by name, so leaving
// them out gives an error that names them; issue 5 adds them.
#include <map>
#include <mutex>

#include "runtime.h"

namespace {

std::mutex guard;
std::map<int, int32_t> settings;

}  // namespace

// HcclConfig is an enumeration and HcclConfigValue a union of one int32_t.
CANN_API int HcclSetConfig(int setting, int32_t value) {
    std::lock_guard<std::mutex> lock(guard);
    settings[setting] = value;
    return 0;
}

CANN_API int HcclGetConfig(int setting, int32_t* value) {
    std::lock_guard<std::mutex> lock(guard);
    *value = settings[setting];
    return 0;
}
