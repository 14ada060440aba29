// Who touched which byte of memory, as far as it still matters: what everything to come is ordered behind is forgotten.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "races/clock.h"
#include "races/footprint.h"

namespace cann::races {

// A task of a stream.
struct Task {
    std::string title;
    std::string call_site;  // empty if it is not known
    int32_t device, stream;
    uint64_t number;  // in its stream's clock
};

struct Access {
    std::shared_ptr<const Task> task;
    std::string argument;
    Footprint footprint;
    bool writes;

    bool is_known_to(const Clock& clock) const { return task->number <= clock.of(task->stream); }
};

using Accesses = std::vector<std::shared_ptr<const Access>>;

class History {
public:
    // Adds an access, and returns the earlier ones that it races with: same bytes, one of them writes, and `behind`,
    // what its task is ordered behind, does not know them. What `everyone` knows races with nothing to come.
    Accesses add(const std::shared_ptr<const Access>& access, const Clock& behind, const Clock& everyone);

    void forget(uintptr_t begin, size_t bytes);

private:
    struct Cell {
        uintptr_t end;
        Accesses accesses;
    };
    using Cells = std::map<uintptr_t, Cell>;

    void split(uintptr_t at);
    Cells::iterator cell_at(uintptr_t begin, uintptr_t end);
    void merge(uintptr_t begin, uintptr_t end);

    Cells cells_;  // by where they begin; they do not overlap
};

}  // namespace cann::races
