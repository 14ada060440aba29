// Events: a record is a task on its stream that notes the time, so elapsed times are those of the emulated work.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "races/check.h"
#include "runtime/stream.h"
#include "runtime/trace.h"

namespace cann {
namespace {

using Clock = std::chrono::steady_clock;

struct Event {
    std::mutex guard;
    std::condition_variable done;
    uint64_t recorded = 0;   // records asked for ...
    uint64_t completed = 0;  // ... and records the stream has reached
    Clock::time_point time;
    races::Clock reached;    // what the latest record is ordered behind

    bool ready() {
        std::lock_guard<std::mutex> lock(guard);
        return completed == recorded;
    }
    // The same, for the program.
    bool seen_ready() {
        std::lock_guard<std::mutex> lock(guard);
        if (completed == recorded) races::seen_on_host(reached);
        return completed == recorded;
    }
    void wait_for(uint64_t record) {
        std::unique_lock<std::mutex> lock(guard);
        done.wait(lock, [&] { return completed >= record; });
    }
};

std::mutex guard;
// Shared: a task on a stream may outlive aclrtDestroyEvent.
std::unordered_map<void*, std::shared_ptr<Event>> events;

std::shared_ptr<Event> find_event(aclrtEvent handle) {
    std::lock_guard<std::mutex> lock(guard);
    const auto found = events.find(handle);
    return found == events.end() ? nullptr : found->second;
}

aclError unknown_event(aclrtEvent event) {
    return fail(ACL_ERROR_INVALID_RESOURCE_HANDLE, "event %p does not exist", event);
}

}  // namespace
}  // namespace cann

using namespace cann;

CANN_API aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) {
    auto created = std::make_shared<Event>();
    std::lock_guard<std::mutex> lock(guard);
    *event = created.get();
    events.emplace(created.get(), std::move(created));
    return ACL_SUCCESS;
}

CANN_API aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) {
    return aclrtCreateEventExWithFlag(event, flag);
}

CANN_API aclError aclrtCreateEvent(aclrtEvent* event) { return aclrtCreateEventExWithFlag(event, 0); }

CANN_API aclError aclrtDestroyEvent(aclrtEvent event) {
    std::lock_guard<std::mutex> lock(guard);
    return events.erase(event) == 1 ? ACL_SUCCESS : unknown_event(event);
}

CANN_API aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
    auto event = find_event(handle);
    auto* stream = find_stream(stream_handle);
    if (event == nullptr) return unknown_event(handle);
    if (stream == nullptr) return fail(ACL_ERROR_INVALID_RESOURCE_HANDLE, "stream %p does not exist", stream_handle);
    {
        std::lock_guard<std::mutex> lock(event->guard);
        ++event->recorded;
        event->reached = races::now(*stream);
    }
    ++stream->marks;
    stream->submit([event] {
        std::lock_guard<std::mutex> lock(event->guard);
        event->time = Clock::now();
        ++event->completed;
        event->done.notify_all();
    });
    return ACL_SUCCESS;
}

CANN_API aclError aclrtResetEvent(aclrtEvent handle, aclrtStream) {
    return find_event(handle) == nullptr ? unknown_event(handle) : ACL_SUCCESS;
}

CANN_API aclError aclrtStreamWaitEvent(aclrtStream stream_handle, aclrtEvent handle) {
    auto event = find_event(handle);
    auto* stream = find_stream(stream_handle);
    if (event == nullptr) return unknown_event(handle);
    if (stream == nullptr) return fail(ACL_ERROR_INVALID_RESOURCE_HANDLE, "stream %p does not exist", stream_handle);
    uint64_t record;
    {
        std::lock_guard<std::mutex> lock(event->guard);
        record = event->recorded;  // the record known now, not one that is asked for later
        races::wait(*stream, event->reached);
    }
    stream->submit([event, record] { event->wait_for(record); });
    return ACL_SUCCESS;
}

CANN_API aclError aclrtSynchronizeEvent(aclrtEvent handle) {
    auto event = find_event(handle);
    if (event == nullptr) return unknown_event(handle);
    uint64_t record;
    races::Clock reached;
    {
        std::lock_guard<std::mutex> lock(event->guard);
        record = event->recorded;
        reached = event->reached;
    }
    event->wait_for(record);
    races::wait_on_host(reached);
    trace::sync("event", current_device(), -1);
    return fault();
}

CANN_API aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
    auto event = find_event(handle);
    if (event == nullptr) return unknown_event(handle);
    *status = event->seen_ready() ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus* status) {
    auto event = find_event(handle);
    if (event == nullptr) return unknown_event(handle);
    *status = event->seen_ready() ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
    auto first = find_event(start);
    auto last = find_event(end);
    if (first == nullptr) return unknown_event(start);
    if (last == nullptr) return unknown_event(end);
    if (first->recorded == 0 || last->recorded == 0 || !first->ready() || !last->ready()) {
        return fail(ACL_ERROR_INVALID_PARAM, "elapsed time of an event that has not been recorded or reached");
    }
    *milliseconds = std::chrono::duration<float, std::milli>(last->time - first->time).count();
    return ACL_SUCCESS;
}
