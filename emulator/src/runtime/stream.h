// Streams: everything a device does is a task on a stream. Tasks run at once on the calling thread, or with
// CANN_EMULATOR_ASYNC=1 later on a thread of the stream, so that a missing synchronisation shows.
#pragma once

#include <atomic>
#include <functional>

#include "runtime/runtime.h"

namespace cann {

class Stream {
public:
    Stream(int32_t device, int32_t id) : device(device), id(id) {}
    virtual ~Stream() = default;

    virtual void submit(std::function<void()> task) { task(); }
    virtual void synchronize() {}
    virtual bool idle() { return true; }

    // Submits a task that may fail, and returns its error. A stream that runs it later never does, however early the
    // task is done: the error's message is that of another thread. It reports the error at the next synchronisation.
    virtual int launch(std::function<int()> task) { return task(); }

    const int32_t device;
    const int32_t id;
    uint32_t overflow_switch = 0;
    // How often the program has waited for the stream, or recorded an event for others to wait for: what was launched
    // before the latest can be ordered before work on other streams.
    std::atomic<uint64_t> marks{0};
};

// The stream behind a handle (the default stream of the current device for nullptr); nullptr if it is none of ours.
Stream* find_stream(aclrtStream handle);

// Waits for every stream of a device.
void synchronize_device(int32_t device);

}  // namespace cann
