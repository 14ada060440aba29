#include "races/history.h"

#include <algorithm>
#include <set>

namespace cann::races {
namespace {

// Whether whatever races with `old` later races with `now` too. What covers only some bytes of a cell stands for nobody
// but its like.
bool stands_for(const Access& now, const Access& old) {
    return (now.writes || !old.writes) && (now.footprint.dense() || now.footprint == old.footprint);
}

}  // namespace

Accesses History::add(const std::shared_ptr<const Access>& access, const Clock& behind, const Clock& everyone) {
    const uintptr_t begin = access->footprint.begin, end = access->footprint.end();
    split(begin);
    split(end);
    Accesses races;
    std::set<const Access*> compared;  // an access may be in many cells
    for (uintptr_t at = begin; at < end;) {
        const auto cell = cell_at(at, end);
        Accesses& others = cell->second.accesses;
        for (const auto& other : others) {
            const bool harmless = other->is_known_to(behind) || !(access->writes || other->writes);
            if (harmless || !compared.insert(other.get()).second) continue;
            if (overlap(access->footprint, other->footprint)) races.push_back(other);
        }
        std::erase_if(others, [&](const auto& other) {
            return other->is_known_to(everyone) || (other->is_known_to(behind) && stands_for(*access, *other));
        });
        others.push_back(access);
        at = cell->second.end;
    }
    merge(begin, end);
    return races;
}

void History::forget(uintptr_t begin, size_t bytes) {
    split(begin);
    split(begin + bytes);
    cells_.erase(cells_.lower_bound(begin), cells_.lower_bound(begin + bytes));
}

// Lets a cell end where another one begins.
void History::split(uintptr_t at) {
    const auto next = cells_.lower_bound(at);
    if (next == cells_.begin()) return;
    Cell& cell = std::prev(next)->second;
    if (cell.end <= at) return;
    cells_.emplace_hint(next, at, Cell{cell.end, cell.accesses});
    cell.end = at;
}

// The cell that begins there; a new one up to the next, or to `end`, if there is none.
History::Cells::iterator History::cell_at(uintptr_t begin, uintptr_t end) {
    const auto next = cells_.lower_bound(begin);
    if (next != cells_.end() && next->first == begin) return next;
    return cells_.emplace_hint(next, begin, Cell{next == cells_.end() ? end : std::min(end, next->first), {}});
}

// Joins neighbours of which the same is known, from the one before `begin` to the one behind `end`.
void History::merge(uintptr_t begin, uintptr_t end) {
    auto cell = cells_.lower_bound(begin);
    if (cell != cells_.begin()) --cell;
    for (auto next = std::next(cell); next != cells_.end() && next->first <= end; next = std::next(cell)) {
        if (cell->second.end == next->first && cell->second.accesses == next->second.accesses) {
            cell->second.end = next->second.end;
            cells_.erase(next);
        } else {
            cell = next;
        }
    }
}

}  // namespace cann::races
