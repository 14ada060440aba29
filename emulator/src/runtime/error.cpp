// Error reporting: messages are per thread, and reading one clears it, as aclGetRecentErrMsg documents.
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string_view>

#include "runtime/runtime.h"

namespace cann {
namespace {

thread_local std::string pending;
thread_local std::string returned;  // keeps the pointer given to the caller alive until the next call
thread_local aclError last_error = ACL_SUCCESS;

std::string vformat(const char* format, va_list arguments) {
    char buffer[2048];
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    return buffer;
}

std::mutex guard;
std::string fault_message;
std::atomic<aclError> fault_code{ACL_SUCCESS};

thread_local bool runs_stream = false;

// Whether errors of this thread have no caller: of a stream's thread, and of the one that launches for torch_npu when
// TASK_QUEUE_ENABLE is not 0, which torch_npu names so.
bool runs_behind_the_program() {
    if (runs_stream) return true;
    char name[16];  // the longest that Linux has
    return prctl(PR_GET_NAME, name) == 0 && std::string_view(name) == "acl_thread";
}

char last_message[2048];  // of any thread, for a handler that may not allocate
struct sigaction next_handler;

void report_crash(int signal) {
    constexpr std::string_view kReport = "[CANN emulator] segmentation fault; the last error before it was: ";
    if (*last_message != '\0') {
        for (std::string_view text : {kReport, std::string_view(last_message), std::string_view("\n")}) {
            if (write(STDERR_FILENO, text.data(), text.size()) < 0) break;
        }
    }
    sigaction(signal, &next_handler, nullptr);  // the instruction runs again, and meets the handler that was there
}

}  // namespace

void report_crashes() {
    struct sigaction handler = {};
    handler.sa_handler = report_crash;
    sigaction(SIGSEGV, &handler, &next_handler);
}

void run_behind_the_program() { runs_stream = true; }

aclError fail_launch(aclError code, const std::string& message) {
    // Elsewhere errors reach the caller at once, and nothing is dropped after them.
    const bool queued = runs_behind_the_program();
    std::lock_guard<std::mutex> lock(guard);
    if (queued && fault_code == ACL_SUCCESS) {
        fault_message = message;
        fault_code = code;
    }
    return fail(code, "%s", message.c_str());
}

aclError fault() {
    if (fault_code == ACL_SUCCESS) return ACL_SUCCESS;
    std::lock_guard<std::mutex> lock(guard);
    return fail(fault_code, "an earlier launch failed and nothing runs after it: %s", fault_message.c_str());
}

aclError fail(aclError code, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    pending = vformat(format, arguments);
    va_end(arguments);
    pending.copy(last_message, sizeof last_message - 1);
    last_message[std::min(pending.size(), sizeof last_message - 1)] = '\0';
    last_error = code;
    return code;
}

std::string recent_message() { return pending; }

void die(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const std::string reason = vformat(format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "[CANN emulator] fatal: %s\n", reason.c_str());
    std::fflush(nullptr);
    std::abort();
}

}  // namespace cann

CANN_API const char* aclGetRecentErrMsg() {
    if (cann::pending.empty()) return nullptr;
    cann::returned = "[CANN emulator] " + cann::pending;
    cann::pending.clear();
    return cann::returned.c_str();
}

CANN_API aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return cann::last_error; }

CANN_API aclError aclrtGetLastError(aclrtLastErrLevel) {
    const aclError code = cann::last_error;
    cann::last_error = ACL_SUCCESS;
    return code;
}

CANN_API void aclAppLog(aclLogLevel level, const char* function, const char*, uint32_t line, const char* format, ...) {
    // ASCEND_GLOBAL_LOG_LEVEL and ASCEND_SLOG_PRINT_TO_STDOUT are CANN's own switches for its log.
    const char* print = std::getenv("ASCEND_SLOG_PRINT_TO_STDOUT");
    const char* threshold = std::getenv("ASCEND_GLOBAL_LOG_LEVEL");
    if (print == nullptr || *print != '1' || level < (threshold ? std::atoi(threshold) : ACL_ERROR)) return;
    va_list arguments;
    va_start(arguments, format);
    std::printf("[%d] %s:%u %s\n", level, function, line, cann::vformat(format, arguments).c_str());
    va_end(arguments);
}
