#include "races/footprint.h"

#include <algorithm>

namespace cann::races {

// Dimensions become as few as they can: what repeats without a gap is one run, or one longer dimension.
Footprint Footprint::of(const void* begin, size_t width, std::vector<Dimension> dimensions) {
    std::erase_if(dimensions, [](const Dimension& each) { return each.count == 1 || each.stride == 0; });
    std::sort(dimensions.begin(), dimensions.end(),
              [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
    std::vector<Dimension> outer;
    for (const Dimension& each : dimensions) {
        if (outer.empty() && each.stride <= width) {
            width += (each.count - 1) * each.stride;
        } else if (!outer.empty() && each.stride == outer.back().count * outer.back().stride) {
            outer.back().count *= each.count;
        } else {
            outer.push_back(each);
        }
    }
    std::reverse(outer.begin(), outer.end());
    return {reinterpret_cast<uintptr_t>(begin), width, std::move(outer)};
}

size_t Footprint::extent(size_t dimension) const {
    size_t bytes = width;
    for (size_t i = dimension; i < outer.size(); ++i) bytes += (outer[i].count - 1) * outer[i].stride;
    return bytes;
}

namespace {

// Whether the item of `dimension` that starts at `start` has a byte from `low` up to `high`.
bool touches(const Footprint& footprint, size_t dimension, uintptr_t start, uintptr_t low, uintptr_t high) {
    const uintptr_t end = start + footprint.extent(dimension);
    if (end <= low || high <= start) return false;
    const bool surrounded = low <= start && end <= high;
    if (surrounded || dimension == footprint.outer.size()) return true;
    const auto [count, stride] = footprint.outer[dimension];
    const size_t item = footprint.extent(dimension + 1);
    const size_t first = low < start + item ? 0 : (low - start - item) / stride + 1;
    for (size_t i = first; i < count && start + i * stride < high; ++i) {
        if (touches(footprint, dimension + 1, start + i * stride, low, high)) return true;
    }
    return false;
}

bool meet(const Footprint& a, size_t dimension, uintptr_t start, const Footprint& b) {
    if (!touches(b, 0, b.begin, start, start + a.extent(dimension))) return false;
    if (dimension == a.outer.size()) return true;
    for (size_t i = 0; i < a.outer[dimension].count; ++i) {
        if (meet(a, dimension + 1, start + i * a.outer[dimension].stride, b)) return true;
    }
    return false;
}

}  // namespace

bool overlap(const Footprint& a, const Footprint& b) { return meet(a, 0, a.begin, b); }

}  // namespace cann::races
