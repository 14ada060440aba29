// The chip's description, read once from the environment.
#include <cstdlib>

#include "runtime/runtime.h"

namespace cann {
namespace {

const char* required(const char* name) {
    const char* value = std::getenv(name);
    if (value == nullptr || *value == '\0') {
        die("%s is not set: start the program with `python -m emulator run` or `eval \"$(python -m emulator env)\"`",
            name);
    }
    return value;
}

int64_t number(const char* name) {
    const char* text = required(name);
    char* end = nullptr;
    const long long value = std::strtoll(text, &end, 10);
    if (*end != '\0' || value < 0) die("%s=%s is not a whole number", name, text);
    return value;
}

}  // namespace

const Chip& chip() {
    static const Chip instance{
        required("CANN_EMULATOR_SOC"),
        required("CANN_EMULATOR_VERSION"),
        static_cast<uint32_t>(number("CANN_EMULATOR_DEVICES")),
        static_cast<size_t>(number("CANN_EMULATOR_MEMORY")),
        number("CANN_EMULATOR_CUBE_CORES"),
        number("CANN_EMULATOR_VECTOR_CORES"),
        number("CANN_EMULATOR_L2"),
        number("CANN_EMULATOR_INF_NAN") != 0,
        number("CANN_EMULATOR_PEER_ACCESS") != 0,
    };
    return instance;
}

}  // namespace cann
