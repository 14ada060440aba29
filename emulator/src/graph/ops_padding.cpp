// Padding. GE's paddings are pairs in the order of the dimensions: elements before and after.
#include "graph/shapes.h"

namespace cann::graph {
namespace {

// torch's pairs start with the last dimension.
Tensor padded_with(const Tensor& x, const Ints& pairs, double value) {
    Ints padding;
    for (size_t i = pairs.size(); i >= 2; i -= 2) {
        padding.push_back(pairs[i - 2]);
        padding.push_back(pairs[i - 1]);
    }
    return at::constant_pad_nd(x, padding, value);
}

// Which elements of a dimension the positions before, within and after it repeat.
Tensor repeated(const Tensor& positions, int64_t size, const std::string& mode) {
    if (mode == "edge") return at::clamp(positions, 0, size - 1);
    if (mode == "REFLECT" || mode == "reflect") return size - 1 - at::abs(size - 1 - at::abs(positions));
    TORCH_CHECK(mode == "SYMMETRIC" || mode == "symmetric", "padding by ", mode, " is not emulated");
    const Tensor before = at::where(positions < 0, -1 - positions, positions);
    return at::where(before >= size, 2 * size - 1 - before, before);
}

Ints padded_sizes(const Tensor& x, const Ints& pairs) {
    Ints sizes = x.sizes().vec();
    for (size_t i = 0; i < sizes.size(); ++i) sizes[i] += pairs.at(2 * i) + pairs.at(2 * i + 1);
    return sizes;
}

Tensor padded_by(Tensor x, const Ints& pairs, const std::string& mode) {
    if (x.is_meta()) {
        repeated(at::arange(1), 1, mode);  // refuses a mode that there is not
        return shaped(padded_sizes(x, pairs), x.scalar_type());
    }
    for (int64_t dim = 0; dim < x.dim(); ++dim) {
        const int64_t before = pairs.at(2 * dim), after = pairs.at(2 * dim + 1), size = x.size(dim);
        if (before == 0 && after == 0) continue;
        const Tensor positions = at::arange(-before, size + after, x.options().dtype(at::kLong));
        x = at::index_select(x, dim, repeated(positions, size, mode));
    }
    return x;
}

// All elements before, and then all after.
Ints as_pairs(const Ints& padding) {
    Ints pairs;
    for (size_t i = 0; i < padding.size() / 2; ++i) {
        pairs.push_back(padding[i]);
        pairs.push_back(padding[i + padding.size() / 2]);
    }
    return pairs;
}

Tensor padded(const Operands& x) {
    const std::string mode = x.text("mode", "constant");
    const Ints pairs = x.flag("paddings_contiguous", true) ? x.ints(1) : as_pairs(x.ints(1));
    if (mode != "constant") return padded_by(x[0], pairs, mode);
    return padded_with(x[0], pairs, x[2].defined() && !x.compiling() ? x[2].item<double>() : 0);
}

}  // namespace
}  // namespace cann::graph

GE_MOVES(PadV2, padded(x))
GE_MOVES(PadV3, padded(x))
GE_MOVES(MirrorPad, padded_by(x[0], x.ints(1), x.text("mode", "REFLECT")))
