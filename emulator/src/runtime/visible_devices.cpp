// As in CANN: docs/zh/env_vars/ASCEND_RT_VISIBLE_DEVICES.md and Runtime::GetVisibleDevices (src/runtime/core/src/
// runtime.cc) of the public hicann/runtime, whose error EE2002 is the text below.
#include "runtime/visible_devices.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <string_view>

namespace cann {
namespace {

// The numbers before the first thing that is not one of 0 to `devices` - 1 behind a comma.
std::vector<int32_t> read_numbers(std::string_view text, uint32_t devices) {
    std::vector<int32_t> numbers;
    for (size_t at = 0; at < text.size();) {
        const size_t end = std::min(text.find_first_not_of("0123456789", at), text.size());
        if (end == at || end - at > 9) break;
        const int32_t number = std::atoi(std::string(text.substr(at, end - at)).c_str());
        if (number >= static_cast<int32_t>(devices)) break;
        numbers.push_back(number);
        if (end < text.size() && text[end] != ',') break;
        at = end + 1;
    }
    return numbers;
}

VisibleDevices read() {
    const char* text = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
    const uint32_t devices = chip().devices;
    if (text == nullptr) {
        VisibleDevices all{std::vector<int32_t>(devices), ""};
        std::iota(all.numbers.begin(), all.numbers.end(), 0);
        return all;
    }
    const std::vector<int32_t> numbers = read_numbers(text, devices);
    std::string expected = numbers.empty() ? "[0, " + std::to_string(devices) + ")" : "";
    for (size_t i = 1; i < numbers.size() && expected.empty(); ++i) {
        if (numbers[i] < numbers[i - 1]) expected = "configured in ascending order";
        if (numbers[i] == numbers[i - 1]) expected = "cannot be duplicated";
    }
    if (expected.empty()) return {numbers, ""};
    return {{}, std::string("EE2002: Value ") + text + " for environment variable ASCEND_RT_VISIBLE_DEVICES is invalid. "
                "Expected value: " + expected + "."};
}

}  // namespace

const VisibleDevices& visible_devices() {
    static const VisibleDevices instance = read();
    return instance;
}

}  // namespace cann
