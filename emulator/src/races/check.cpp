#include "races/check.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>

#include "ops/operator.h"
#include "races/call_site.h"
#include "races/history.h"

namespace cann::races {
namespace {

constexpr int kExitCode = 66;  // as that of ThreadSanitizer

std::mutex guard;

struct State {
    Timelines timelines;
    History history;
    std::set<std::string> reported;
};

// Never destroyed: torch_npu gives memory back when static objects are gone already.
State& state() {
    static auto* instance = new State;
    return *instance;
}

Clock& clock_of(const Stream& stream) { return state().timelines.of(stream.id, stream.device); }

// A program that ended well has not: its results depend on the order in which its tasks happened to run.
void conclude(int status, void*) {
    const size_t count = state().reported.size();
    if (count == 0) return;
    std::fprintf(stderr, "[CANN emulator] %zu race%s\n", count, count == 1 ? "" : "s");
    std::fflush(nullptr);
    if (status == 0) _exit(kExitCode);
}

std::string hex(uintptr_t address) {
    char text[32];
    std::snprintf(text, sizeof text, "0x%zx", static_cast<size_t>(address));
    return text;
}

std::string describe(const Access& access) {
    return access.task->title + (access.writes ? " writes " : " reads ") + access.argument +
           (access.task->call_site.empty() ? "" : ", at " + access.task->call_site);
}

std::string place(const Access& access) {
    return "\n      on stream " + std::to_string(access.task->stream) + " of device " +
           std::to_string(access.task->device) + ", bytes " + hex(access.footprint.begin) + " to " +
           hex(access.footprint.end()) + (access.footprint.dense() ? "" : " with gaps");
}

void report(const Access& earlier, const Access& later) {
    const std::string first = describe(earlier), second = describe(later);
    if (!state().reported.insert(first + "\n" + second).second) return;
    const int32_t device = find_region(reinterpret_cast<void*>(later.footprint.begin)).device;
    const std::string memory = device == kHost ? "pinned memory" : "memory of device " + std::to_string(device);
    std::fprintf(stderr, "[CANN emulator] race in %s, nothing orders\n  %s%s\n  %s%s\n", memory.c_str(), first.c_str(),
                 place(earlier).c_str(), second.c_str(), place(later).c_str());
}

Footprint footprint_of(const TensorArgument& tensor) {
    const auto bytes = static_cast<size_t>(c10::elementSize(tensor.dtype));
    if (is_private(tensor.format)) {
        return Footprint::of(tensor.data, c10::multiply_integers(tensor.storage_sizes) * bytes);
    }
    std::vector<Dimension> dimensions;
    for (size_t i = 0; i < tensor.sizes.size(); ++i) {
        dimensions.push_back({static_cast<size_t>(tensor.sizes[i]), static_cast<size_t>(tensor.strides[i]) * bytes});
    }
    return Footprint::of(tensor.begin(), bytes, std::move(dimensions));
}

}  // namespace

bool enabled() {
    static const bool is_asked_for = [] {
        const char* setting = std::getenv("CANN_EMULATOR_CHECK_RACES");
        const bool is_on = setting != nullptr && *setting == '1';
        if (is_on) on_exit(conclude, nullptr);
        return is_on;
    }();
    return is_asked_for;
}

void launch(const Stream& stream, const std::string& title, const std::vector<Use>& uses) {
    if (!enabled()) return;
    auto task = std::make_shared<Task>(Task{title, call_site(), stream.device, stream.id, 0});
    std::lock_guard<std::mutex> lock(guard);
    Clock& clock = clock_of(stream);
    clock.advance(stream.id);
    task->number = clock.of(stream.id);
    for (const Use& use : uses) {
        if (!find_region(reinterpret_cast<void*>(use.footprint.begin))) continue;
        const auto access = std::make_shared<const Access>(Access{task, use.argument, use.footprint, use.writes});
        const Accesses races = state().history.add(access, clock, state().timelines.host());
        for (const auto& earlier : races) report(*earlier, *access);
    }
}

void launch(const Stream& stream, const Call& call) {
    if (!enabled()) return;
    std::vector<Use> uses;
    for (const Argument& argument : call.arguments) {
        for (const auto& tensor : argument.tensors) {
            if (tensor->bytes() == 0) continue;
            uses.push_back({argument.name, footprint_of(*tensor), argument.written});
        }
    }
    launch(stream, call.title(), uses);
}

Clock now(const Stream& stream) {
    if (!enabled()) return {};
    std::lock_guard<std::mutex> lock(guard);
    return clock_of(stream);
}

void wait(const Stream& stream, const Clock& reached) {
    if (!enabled()) return;
    std::lock_guard<std::mutex> lock(guard);
    clock_of(stream).join(reached);
}

void wait_on_host(const Clock& reached) {
    if (!enabled()) return;
    std::lock_guard<std::mutex> lock(guard);
    state().timelines.wait_on_host(reached);
}

void wait_on_host(const Stream& stream) { wait_on_host(now(stream)); }

void wait_on_host(int32_t device) {
    if (!enabled()) return;
    std::lock_guard<std::mutex> lock(guard);
    state().timelines.wait_on_host(device);
}

void seen_on_host(const Clock& reached) {
    if (enabled() && is_thread_of_program()) wait_on_host(reached);
}

void forget(const Region& region) {
    if (!enabled()) return;
    std::lock_guard<std::mutex> lock(guard);
    state().history.forget(reinterpret_cast<uintptr_t>(region.base), region.size);
}

}  // namespace cann::races
