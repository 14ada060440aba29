// Vector clocks: how far each stream has come, as far as somebody knows. The tasks of a stream are numbered from 1.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace cann::races {

class Clock {
public:
    uint64_t of(int32_t stream) const {
        return static_cast<size_t>(stream) < tasks_.size() ? tasks_[stream] : 0;
    }

    void advance(int32_t stream) {
        if (tasks_.size() <= static_cast<size_t>(stream)) tasks_.resize(stream + 1);
        ++tasks_[stream];
    }

    // To know what the other knows, too.
    void join(const Clock& other) {
        if (tasks_.size() < other.tasks_.size()) tasks_.resize(other.tasks_.size());
        for (size_t i = 0; i < other.tasks_.size(); ++i) tasks_[i] = std::max(tasks_[i], other.tasks_[i]);
    }

private:
    std::vector<uint64_t> tasks_;
};

// What the streams and the host know.
class Timelines {
public:
    // What the next task of a stream will be ordered behind.
    Clock& of(int32_t stream, int32_t device) {
        Clock& clock = streams_.try_emplace(stream, Timeline{device, {}}).first->second.clock;
        clock.join(host_);
        return clock;
    }

    const Clock& host() const { return host_; }
    void wait_on_host(const Clock& reached) { host_.join(reached); }
    void wait_on_host(int32_t device) {
        for (const auto& [stream, timeline] : streams_) {
            if (timeline.device == device) host_.join(timeline.clock);
        }
    }

private:
    struct Timeline {
        int32_t device;
        Clock clock;
    };

    std::map<int32_t, Timeline> streams_;
    Clock host_;
};

}  // namespace cann::races
