// Msprof: torch_npu reports every launch to it. Nobody collects (the emulator has its own trace), so reports are
// accepted and dropped; hashes and cycle counts are real because callers use their values.
#include <chrono>
#include <functional>
#include <string_view>

#include "runtime/runtime.h"

CANN_API int32_t MsprofRegisterCallback(uint32_t, int32_t (*)(uint32_t, void*, uint32_t)) { return 0; }
CANN_API int32_t MsprofReportApi(uint32_t, const void*) { return 0; }
CANN_API int32_t MsprofReportCompactInfo(uint32_t, const void*, uint32_t) { return 0; }
CANN_API int32_t MsprofReportAdditionalInfo(uint32_t, const void*, uint32_t) { return 0; }

CANN_API uint64_t MsprofGetHashId(const char* text, size_t length) {
    return std::hash<std::string_view>{}(std::string_view(text, length));
}

CANN_API uint64_t MsprofSysCycleTime() {
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}
