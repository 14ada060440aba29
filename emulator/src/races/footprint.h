// The bytes that a tensor covers. Views of one allocation may interleave without a common byte, so what is compared is
// not only where they begin and end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cann::races {

struct Dimension {
    size_t count, stride;  // in bytes

    bool operator==(const Dimension&) const = default;
};

struct Footprint {
    uintptr_t begin;
    size_t width;                  // of each run of bytes
    std::vector<Dimension> outer;  // how the runs repeat, the largest stride first; empty: there is one run

    // Elements of `width` bytes, or of anything that repeats so.
    static Footprint of(const void* begin, size_t width, std::vector<Dimension> dimensions = {});

    bool dense() const { return outer.empty(); }
    uintptr_t end() const { return begin + extent(0); }
    size_t extent(size_t dimension) const;  // from the first to the last byte of one item of that dimension

    bool operator==(const Footprint&) const = default;
};

// Whether there is a byte in both.
bool overlap(const Footprint& a, const Footprint& b);

}  // namespace cann::races
