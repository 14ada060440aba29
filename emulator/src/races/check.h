// The check of `emulator run --check-races`: two tasks that use the same bytes, one of them writing, must be ordered.
// A stream orders its tasks; an event what is behind it on other streams; a task is behind what the program has waited
// for. What is ordered does not depend on when the tasks really run. Without the check these functions do nothing.
//
// All threads of the program count as one: how they wait for each other cannot be seen from here.
#pragma once

#include <string>
#include <vector>

#include "races/clock.h"
#include "races/footprint.h"
#include "runtime/memory.h"
#include "runtime/stream.h"

namespace cann {
struct Call;
}

namespace cann::races {

bool enabled();

// What a task does to some memory. Only device memory and pinned memory count.
struct Use {
    std::string argument;
    Footprint footprint;
    bool writes;
};

// A task is about to be launched.
void launch(const Stream& stream, const std::string& title, const std::vector<Use>& uses);
void launch(const Stream& stream, const Call& call);

// What the next task of the stream will be ordered behind: for an event that records it.
Clock now(const Stream& stream);
// Orders the next tasks of a stream, or all tasks that are launched from now on, behind it.
void wait(const Stream& stream, const Clock& reached);
void wait_on_host(const Clock& reached);
void wait_on_host(const Stream& stream);
void wait_on_host(int32_t device);  // for all of its streams
// The same for one who asks and does not wait. torch_npu's watchdog asks all the time, for nobody else.
void seen_on_host(const Clock& reached);

// The memory is gone; what is there next has nothing to do with it.
void forget(const Region& region);

}  // namespace cann::races
