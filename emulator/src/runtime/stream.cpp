// The stream half of aclrt: creation, synchronisation and host callbacks.
#include "runtime/stream.h"

#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "races/check.h"
#include "runtime/trace.h"

namespace cann {
namespace {

std::mutex guard;
std::unordered_map<void*, std::unique_ptr<Stream>> streams;
std::unordered_map<int32_t, Stream*> default_streams;
int32_t next_id = 0;

class ThreadedStream final : public Stream {
public:
    ThreadedStream(int32_t device, int32_t id) : Stream(device, id), worker_([this] { work(); }) {}

    ~ThreadedStream() override {
        submit(nullptr);  // ends the worker
        worker_.join();
    }

    void submit(std::function<void()> task) override {
        std::lock_guard<std::mutex> lock(guard_);
        tasks_.push_back(std::move(task));
        changed_.notify_all();
    }

    int launch(std::function<int()> task) override {
        submit(std::move(task));
        return ACL_SUCCESS;
    }

    void synchronize() override {
        std::unique_lock<std::mutex> lock(guard_);
        changed_.wait(lock, [this] { return tasks_.empty(); });
    }

    bool idle() override {
        std::lock_guard<std::mutex> lock(guard_);
        return tasks_.empty();
    }

private:
    void work() {
        aclrtSetDevice(device);
        run_behind_the_program();
        std::unique_lock<std::mutex> lock(guard_);
        while (true) {
            changed_.wait(lock, [this] { return !tasks_.empty(); });
            const std::function<void()> task = tasks_.front();  // stays in the queue until it is done
            if (!task) return;
            lock.unlock();
            task();
            lock.lock();
            tasks_.pop_front();
            changed_.notify_all();
        }
    }

    std::mutex guard_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> tasks_;
    std::thread worker_;
};

bool asynchronous() {
    const char* setting = std::getenv("CANN_EMULATOR_ASYNC");
    return setting != nullptr && *setting == '1';
}

Stream* create(int32_t device) {
    const int32_t id = next_id++;
    std::unique_ptr<Stream> stream;
    if (asynchronous()) {
        stream = std::make_unique<ThreadedStream>(device, id);
    } else {
        stream = std::make_unique<Stream>(device, id);
    }
    Stream* handle = stream.get();
    streams.emplace(handle, std::move(stream));
    return handle;
}

}  // namespace

Stream* find_stream(aclrtStream handle) {
    std::lock_guard<std::mutex> lock(guard);
    if (handle == nullptr) {
        Stream*& stream = default_streams[current_device()];
        if (stream == nullptr) stream = create(current_device());
        return stream;
    }
    const auto found = streams.find(handle);
    return found == streams.end() ? nullptr : found->second.get();
}

void synchronize_device(int32_t device) {
    std::vector<Stream*> waited_for;
    {
        std::lock_guard<std::mutex> lock(guard);
        for (auto& entry : streams) {
            if (entry.second->device == device) waited_for.push_back(entry.second.get());
        }
    }
    for (Stream* stream : waited_for) {
        stream->synchronize();  // without the lock, which a task may need
        ++stream->marks;
    }
}

}  // namespace cann

using cann::find_stream;

static aclError unknown_stream(aclrtStream stream) {
    return cann::fail(ACL_ERROR_INVALID_RESOURCE_HANDLE, "stream %p does not exist", stream);
}

CANN_API aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
    std::lock_guard<std::mutex> lock(cann::guard);
    *stream = cann::create(cann::current_device());
    return ACL_SUCCESS;
}

CANN_API aclError aclrtCreateStream(aclrtStream* stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }

CANN_API aclError aclrtDestroyStream(aclrtStream stream) {
    auto* found = find_stream(stream);
    if (stream == nullptr || found == nullptr) return unknown_stream(stream);
    found->synchronize();
    cann::races::wait_on_host(*found);
    std::lock_guard<std::mutex> lock(cann::guard);
    cann::streams.erase(stream);
    return ACL_SUCCESS;
}

CANN_API aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

CANN_API aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) {
    auto* found = find_stream(stream);
    if (found == nullptr) return unknown_stream(stream);
    found->synchronize();
    ++found->marks;
    cann::races::wait_on_host(*found);
    cann::trace::sync("stream", found->device, found->id);
    return cann::fault();
}

CANN_API aclError aclrtSynchronizeStream(aclrtStream stream) { return aclrtSynchronizeStreamWithTimeout(stream, -1); }

CANN_API aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
    auto* found = find_stream(stream);
    if (found == nullptr) return unknown_stream(stream);
    const bool idle = found->idle();
    if (idle) {
        ++found->marks;
        cann::races::seen_on_host(cann::races::now(*found));
    }
    *status = idle ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
    auto* found = find_stream(stream);
    if (found == nullptr) return unknown_stream(stream);
    *id = found->id;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* arguments) {
    auto* found = find_stream(stream);
    if (found == nullptr) return unknown_stream(stream);
    found->submit([=] { function(arguments); });
    return ACL_SUCCESS;
}

// aclrtLaunchCallback runs its function on the thread that subscribed; with in-order streams any thread is as good.
CANN_API aclError aclrtLaunchCallback(aclrtCallback function, void* data, aclrtCallbackBlockType, aclrtStream stream) {
    return aclrtLaunchHostFunc(stream, function, data);
}

CANN_API aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
CANN_API aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
CANN_API aclError aclrtProcessReport(int32_t) { return ACL_ERROR_WAIT_CALLBACK_TIMEOUT; }

CANN_API aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }

CANN_API aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag) {
    auto* found = find_stream(stream);
    if (found == nullptr) return unknown_stream(stream);
    found->overflow_switch = flag;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t* flag) {
    auto* found = find_stream(stream);
    if (found == nullptr) return unknown_stream(stream);
    *flag = found->overflow_switch;
    return ACL_SUCCESS;
}
