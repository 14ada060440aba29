// Lines are written with one O_APPEND write each, so that several processes may share a trace.
#include "runtime/trace.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>

#include "runtime/runtime.h"

namespace cann::trace {
namespace {

int file() {
    static const int descriptor = [] {
        const char* path = std::getenv("CANN_EMULATOR_TRACE");
        if (path == nullptr || *path == '\0') return -1;
        const int opened = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (opened < 0) die("cannot write the trace file %s", path);
        return opened;
    }();
    return descriptor;
}

std::string where(int device, int stream) {
    return ",\"device\":" + std::to_string(device) + ",\"stream\":" + std::to_string(stream) + "}";
}

}  // namespace

bool enabled() { return file() >= 0; }

void write(const std::string& json) {
    if (!enabled()) return;
    const std::string line = json + "\n";
    if (::write(file(), line.data(), line.size()) < 0) die("the trace file could not be written");
}

void sync(const char* what, int device, int stream) {
    if (enabled()) write(std::string("{\"event\":\"sync\",\"of\":\"") + what + "\"" + where(device, stream));
}

void copy(const char* kind, size_t bytes, int device, int stream) {
    if (!enabled()) return;
    write(std::string("{\"event\":\"copy\",\"kind\":\"") + kind + "\",\"bytes\":" + std::to_string(bytes) +
          where(device, stream));
}

}  // namespace cann::trace
