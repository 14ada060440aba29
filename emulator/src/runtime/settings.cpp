// Settings that CANN keeps per process: system parameters, compile options, saturation mode, time-outs.
#include <cstring>
#include <map>
#include <mutex>

#include "races/check.h"
#include "runtime/settings.h"
#include "runtime/stream.h"

namespace cann {
namespace {

std::mutex guard;
std::map<aclSysParamOpt, int64_t> parameters;
std::map<aclCompileOpt, std::string> options;
aclrtFloatOverflowMode overflow_mode = ACL_RT_OVERFLOW_MODE_UNDEF;  // until set: what the chip does by itself

}  // namespace

std::atomic<bool> overflowed{false};

bool saturates() {
    std::lock_guard<std::mutex> lock(guard);
    if (overflow_mode == ACL_RT_OVERFLOW_MODE_UNDEF) return !chip().inf_nan;
    return overflow_mode == ACL_RT_OVERFLOW_MODE_SATURATION;
}

}  // namespace cann

using namespace cann;

CANN_API aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    std::lock_guard<std::mutex> lock(guard);
    parameters[option] = value;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
    std::lock_guard<std::mutex> lock(guard);
    const auto found = parameters.find(option);
    *value = found == parameters.end() ? 0 : found->second;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    return aclrtSetSysParamOpt(option, value);
}

CANN_API aclError aclSetCompileopt(aclCompileOpt option, const char* value) {
    std::lock_guard<std::mutex> lock(guard);
    options[option] = value;
    return ACL_SUCCESS;
}

// The size counts the terminating zero: torch_npu takes 0 for a failure.
CANN_API size_t aclGetCompileoptSize(aclCompileOpt option) {
    std::lock_guard<std::mutex> lock(guard);
    return options[option].size() + 1;
}

CANN_API aclError aclGetCompileopt(aclCompileOpt option, char* value, size_t length) {
    std::lock_guard<std::mutex> lock(guard);
    const std::string& text = options[option];
    if (length <= text.size()) return fail(ACL_ERROR_INVALID_PARAM, "the option has %zu characters", text.size());
    std::memcpy(value, text.c_str(), text.size() + 1);
    return ACL_SUCCESS;
}

CANN_API aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) {
    if (mode == ACL_RT_OVERFLOW_MODE_INFNAN && !chip().inf_nan) {
        return fail(ACL_ERROR_FEATURE_UNSUPPORTED, "%s only saturates", chip().soc.c_str());
    }
    std::lock_guard<std::mutex> lock(guard);
    overflow_mode = mode;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtGetDeviceSatMode(aclrtFloatOverflowMode* mode) {
    *mode = saturates() ? ACL_RT_OVERFLOW_MODE_SATURATION : ACL_RT_OVERFLOW_MODE_INFNAN;
    return ACL_SUCCESS;
}

// The flag is written to device memory, in order on the stream; a non-zero first word says that something overflowed.
CANN_API aclError aclrtGetOverflowStatus(void* output, size_t size, aclrtStream handle) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return fail(ACL_ERROR_INVALID_RESOURCE_HANDLE, "stream %p does not exist", handle);
    if (size == 0) return ACL_SUCCESS;
    if (races::enabled()) {
        races::launch(*stream, "aclrtGetOverflowStatus", {{"output", races::Footprint::of(output, size), true}});
    }
    stream->submit([=] {
        std::memset(output, 0, size);
        if (overflowed) *static_cast<unsigned char*>(output) = 1;
    });
    return ACL_SUCCESS;
}

CANN_API aclError aclrtResetOverflowStatus(aclrtStream handle) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return fail(ACL_ERROR_INVALID_RESOURCE_HANDLE, "stream %p does not exist", handle);
    stream->submit([] { overflowed = false; });
    return ACL_SUCCESS;
}

// Nothing runs long enough here to be timed out, so the limits are accepted and not used.
CANN_API aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
CANN_API aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
CANN_API aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
    *actual = timeout;
    return ACL_SUCCESS;
}
