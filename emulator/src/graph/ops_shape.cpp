// What only moves values: views, permutations, joins and splits, slices, gathers and scatters, constants.
#include <numeric>

#include "graph/shapes.h"

namespace cann::graph {
namespace {

Ints without(const Ints& sizes, const Ints& dims) {
    const int64_t rank = static_cast<int64_t>(sizes.size());
    Ints kept;
    for (int64_t i = 0; i < rank; ++i) {
        const bool named = std::any_of(dims.begin(), dims.end(), [&](int64_t dim) { return (dim + rank) % rank == i; });
        if (!(sizes[i] == 1 && (named || dims.empty()))) kept.push_back(sizes[i]);
    }
    return kept;
}

// Without any named, all of size 1 go.
Tensor squeezed(const Tensor& x, const Ints& dims) { return x.reshape(without(x.sizes().vec(), dims)); }

Tensor unsqueezed(Tensor x, Ints dims) {
    const int64_t rank = x.dim() + static_cast<int64_t>(dims.size());
    for (int64_t& dim : dims) dim = (dim + rank) % rank;
    std::sort(dims.begin(), dims.end());
    for (int64_t dim : dims) x = x.unsqueeze(dim);
    return x;
}

Tensor reshaped(const Operands& x) {
    const bool whole = x.integer("axis", 0) == 0 && x.integer("num_axes", -1) == -1;
    TORCH_CHECK(whole, "a reshape of some dimensions is not emulated");
    Ints sizes = x.ints(1);
    const bool copies = x.integer("allowzero", 1) == 0;  // torchair does not set it, and means what it says
    for (size_t i = 0; copies && i < sizes.size(); ++i) {
        if (sizes[i] == 0) sizes[i] = x[0].size(i);
    }
    return x[0].reshape(sizes);
}

// Two dimensions: those before the axis, and the others.
Tensor made_matrix(const Tensor& x, int64_t axis) {
    const Ints sizes = x.sizes().vec();
    if (axis < 0) axis += x.dim();
    const auto product = [](auto first, auto last) { return std::accumulate(first, last, int64_t{1}, std::multiplies<>()); };
    return x.reshape({product(sizes.begin(), sizes.begin() + axis), product(sizes.begin() + axis, sizes.end())});
}

Tensor flattened(const Operands& x) { return x[0].flatten(x.integer("axis", 1), x.integer("end_axis", -1)); }

Results parts(const std::vector<Tensor>& tensors) { return {tensors.begin(), tensors.end()}; }

Tensor joined(std::vector<Tensor> tensors, int64_t dim) {
    for (Tensor& tensor : tensors) {
        if (tensor.dim() == 0) tensor = tensor.unsqueeze(0);
    }
    return at::cat(tensors, dim);
}

// A size of -1 is what the others leave.
Results split(const Tensor& x, Ints sizes, int64_t dim) {
    const auto open = std::find(sizes.begin(), sizes.end(), -1);
    if (open != sizes.end()) *open = x.size(dim) - std::accumulate(sizes.begin(), sizes.end(), int64_t{1});
    return parts(x.split_with_sizes(sizes, dim));
}

Results split_evenly(const Tensor& x, int64_t dim, int64_t count) { return split(x, Ints(count, x.size(dim) / count), dim); }

Tensor confusion_transposed(const Operands& x) {
    const Ints order = x.list("perm"), shape = x.list("shape");
    return x.flag("transpose_first") ? x[0].permute(order).reshape(shape) : x[0].reshape(shape).permute(order);
}

// From a position down to before another; negative ones count from the end, and those outside stand for an edge.
Tensor backwards(const Tensor& x, int64_t dim, int64_t begin, int64_t end, int64_t step) {
    const int64_t size = x.size(dim);
    const auto position = [&](int64_t given) { return std::clamp<int64_t>(given < 0 ? given + size : given, -1, size - 1); };
    const int64_t first = position(begin), last = position(std::max(end, -size - 1));
    const int64_t count = std::max<int64_t>((first - last + step - 1) / step, 0);
    Ints sizes = x.sizes().vec();
    sizes[dim] = count;
    if (x.is_meta()) return shaped(sizes, x.scalar_type());
    return at::index_select(x, dim, first - step * at::arange(count, at::kLong));
}

// Both slices; the masks choose the whole range of a dimension, or drop it.
Tensor strided_slice(const Operands& x, const Ints& begin, const Ints& end, Ints dims, Ints steps) {
    TORCH_CHECK(x.integer("ellipsis_mask", 0) == 0 && x.integer("new_axis_mask", 0) == 0,
                "an ellipsis or a new dimension in a slice is not emulated");
    const int64_t from_start = x.integer("begin_mask", 0), to_end = x.integer("end_mask", 0);
    const int64_t dropped = x.integer("shrink_axis_mask", 0);
    Tensor part = x[0];
    Ints shrunk;
    for (size_t i = 0; i < begin.size(); ++i) {
        const int64_t dim = dims.empty() ? static_cast<int64_t>(i) : (dims[i] + part.dim()) % part.dim();
        const int64_t step = steps.empty() ? 1 : steps[i];
        const bool all_from = from_start >> i & 1, all_to = to_end >> i & 1;
        if (dropped >> i & 1) {
            part = part.narrow(dim, begin[i] < 0 ? begin[i] + part.size(dim) : begin[i], 1);
            shrunk.push_back(dim);
        } else if (step < 0) {
            part = backwards(part, dim, all_from ? INT64_MAX : begin[i], all_to ? INT64_MIN : end[i], -step);
        } else {
            part = part.slice(dim, all_from ? 0 : begin[i], all_to ? INT64_MAX : end[i], step);
        }
    }
    return shrunk.empty() ? part : part.reshape(without(part.sizes().vec(), shrunk));
}

Tensor slice(const Operands& x) {
    const Ints begin = x.ints(1), sizes = x.ints(2);
    Tensor part = x[0];
    for (size_t dim = 0; dim < begin.size(); ++dim) {
        part = part.narrow(dim, begin[dim], sizes[dim] < 0 ? part.size(dim) - begin[dim] : sizes[dim]);
    }
    return part;
}

// A size of -1 keeps that of the operand.
Tensor broadcast(const Tensor& x, Ints sizes) {
    const size_t added = sizes.size() - x.dim();
    for (size_t i = 0; i < sizes.size(); ++i) {
        if (sizes[i] == -1) sizes[i] = i < added ? 1 : x.size(i - added);
    }
    return x.expand(sizes);
}

// Either may have the larger size.
Tensor expanded(const Tensor& x, Ints sizes) {
    const int64_t added = static_cast<int64_t>(sizes.size()) - x.dim();
    for (int64_t i = std::max<int64_t>(added, 0); i < static_cast<int64_t>(sizes.size()); ++i) {
        if (sizes[i] == 1) sizes[i] = x.size(i - added);
    }
    if (added < 0) sizes.insert(sizes.begin(), x.sizes().begin(), x.sizes().begin() - added);
    return broadcast(x, sizes);
}

Tensor tiled(const Tensor& x, const Ints& times) { return x.repeat(times); }

Tensor range(const Operands& x) {
    TORCH_CHECK(!x.compiling(), "the bounds of a range must be known when the graph is compiled");
    return at::arange(x[0].item(), x[1].item(), x[2].item(), x[0].scalar_type());
}

// Negative positions count from the end.
Tensor wrapped(const Tensor& index, int64_t size) { return at::where(index < 0, index + size, index); }

Tensor gathered(const Tensor& x, const Tensor& index, int64_t dim) {
    Ints sizes = x.sizes().vec();
    dim = dim < 0 ? dim + x.dim() : dim;
    const int64_t size = sizes[dim];
    sizes.erase(sizes.begin() + dim);
    sizes.insert(sizes.begin() + dim, index.sizes().begin(), index.sizes().end());
    if (x.is_meta()) return shaped(sizes, x.scalar_type());
    return at::index_select(x, dim, wrapped(index, size).flatten()).reshape(sizes);
}

Tensor gathered(const Operands& x, int64_t dim) {
    TORCH_CHECK(x.integer("batch_dims", 0) == 0, "a gather by batches is not emulated");
    for (const char* hint : {"validate_indices", "is_preprocessed", "negative_index_support"}) x.flag(hint);
    return gathered(x[0], x[1], dim);
}

Tensor elements_gathered(const Operands& x) {
    const int64_t dim = x.integer("dim", 0);
    if (x.compiling()) return shaped(x[1].sizes().vec(), x[0].scalar_type());
    return at::gather(x[0], dim, wrapped(x[1].to(at::kLong), x[0].dim() == 0 ? 1 : x[0].size(dim)));
}

// Rows of the last dimension of the indices are positions in the first dimensions of x.
c10::List<std::optional<Tensor>> positions(const Tensor& x, const Tensor& indices) {
    c10::List<std::optional<Tensor>> lists;
    const std::vector<Tensor> all = indices.to(at::kLong).unbind(-1);
    for (size_t i = 0; i < all.size(); ++i) lists.push_back(wrapped(all[i], x.size(i)));
    return lists;
}

Tensor gathered_slices(const Operands& x) {
    TORCH_CHECK(x.integer("batch_dims", 0) == 0, "a gather by batches is not emulated");
    x.flag("negative_index_support");
    if (!x.compiling()) return at::index(x[0], positions(x[0], x[1]));
    Ints sizes(x[1].sizes().begin(), x[1].sizes().end() - 1);
    sizes.insert(sizes.end(), x[0].sizes().begin() + x[1].size(-1), x[0].sizes().end());
    return shaped(sizes, x[0].scalar_type());
}

Tensor slices_scattered(const Operands& x) {
    x.flag("use_locking");
    if (x.compiling()) return x[0];
    return at::index_put(x[0], positions(x[0], x[1]), x[2]);
}

Tensor scattered(const Operands& x) {
    const std::string reduction = x.text("reduction", "none");
    const int64_t axis = x.integer("axis", 0);
    TORCH_CHECK(reduction == "none" || reduction == "add" || reduction == "mul", "a scatter that reduces by ", reduction,
                " is not emulated");
    if (x.compiling()) return x[0];
    const Tensor index = wrapped(x[1].to(at::kLong), x[0].dim() == 0 ? 1 : x[0].size(axis));
    if (reduction == "none") return at::scatter(x[0], axis, index, x[2]);
    return at::scatter_reduce(x.up(0), axis, index, x.up(2), reduction == "add" ? "sum" : "prod");
}

Tensor indexed(const Operands& x) {
    c10::List<std::optional<Tensor>> indices;
    size_t next = 1;
    for (int64_t given : x.list("indices_mask")) indices.push_back(given ? std::optional(x[next++]) : std::nullopt);
    return at::index(x[0], indices);
}

Tensor index_added(const Operands& x) {
    const Tensor updates = x[3].defined() ? x.up(2) * x.up(3) : x.up(2);
    return at::index_add(x.up(0), x.integer("axis"), x[1], updates);
}

// The shape, which is known when the graph is compiled.
Tensor shape_of(const Operands& x) {
    return at::tensor(x[0].sizes(), at::kLong).to(x.dtype("dtype", at::kInt));
}

Tensor size_of(const Operands& x) {
    return at::scalar_tensor(x[0].numel(), at::kLong).to(x.dtype("dtype", at::kInt));
}

Tensor triangle(const Operands& x) {
    const Ints diagonal = x.ints("k");
    const int64_t k = diagonal.empty() ? 0 : diagonal[0];
    return x.flag("upper", true) ? at::triu(x[0], k) : at::tril(x[0], k);
}

Tensor linspace(const Operands& x) {
    TORCH_CHECK(!x.compiling(), "the bounds of linspace must be known when the graph is compiled");
    return at::linspace(x[0].item(), x[1].item(), x.ints(2).at(0), x[0].options());
}

Tensor strided(const Operands& x) { return at::as_strided(x[0], x.ints(1), x.ints(2), x.ints(3).at(0)).contiguous(); }

// Not into the operand itself: converters go on with the result, and others may read the operand.
Tensor copied_to_view(const Operands& x) {
    const Tensor whole = x[0].clone();
    const Tensor source = at::as_strided(x[4], x.ints(5), x.ints(6), x.ints(7).at(0));
    at::as_strided(whole, x.ints(1), x.ints(2), x.ints(3).at(0)).copy_(source);
    return whole;
}

}  // namespace
}  // namespace cann::graph

GE_VIEWS(Reshape, reshaped(x))
GE_VIEWS(Unsqueeze, unsqueezed(x[0], x.list("axes")))
GE_VIEWS(ExpandDims, unsqueezed(x[0], x.ints(1)))
GE_VIEWS(UnsqueezeV3, unsqueezed(x[0], x.ints(1)))
GE_VIEWS(Squeeze, squeezed(x[0], x.list("axis")))
GE_VIEWS(SqueezeV3, squeezed(x[0], x.ints("axes")))
GE_VIEWS(Flatten, made_matrix(x[0], x.integer("axis", 1)))
GE_VIEWS(FlattenV2, flattened(x))
GE_MOVES(TransData, x[0])
GE_MOVES(Transpose, x[0].permute(x.ints(1)))
GE_MOVES(Permute, x[0].permute(x.list("order")))
GE_MOVES(ConfusionTransposeD, confusion_transposed(x))
GE_MOVES(ConcatV2, joined(x.from(0, x.size() - 1), x.ints(x.size() - 1).at(0)))
GE_MOVES(ConcatD, joined(x.from(0), x.integer("concat_dim")))
GE_MOVES(Pack, (x.integer("N", 0), at::stack(x.from(0), x.integer("axis", 0))))
GE_MOVES(Unpack, (x.integer("num"), parts(x[0].unbind(x.integer("axis", 0)))))
GE_MOVES(SplitV, (x.integer("num_split"), split(x[0], x.ints(1), x.ints(2).at(0))))
GE_MOVES(SplitVD, (x.integer("num_split"), split(x[0], x.list("size_splits"), x.integer("split_dim"))))
GE_MOVES(Split, split_evenly(x[1], x.ints(0).at(0), x.integer("num_split")))
GE_MOVES(SplitD, split_evenly(x[0], x.integer("split_dim"), x.integer("num_split")))
GE_MOVES(Slice, slice(x))
GE_MOVES(StridedSlice, strided_slice(x, x.ints(1), x.ints(2), {}, x.ints(3)))
GE_MOVES(StridedSliceV2, strided_slice(x, x.ints(1), x.ints(2), x.ints("axes"), x.ints("strides")))
GE_MOVES(BroadcastTo, broadcast(x[0], x.ints(1)))
GE_MOVES(Expand, expanded(x[0], x.ints(1)))
GE_MOVES(Tile, tiled(x[0], x.ints(1)))
GE_MOVES(ReverseV2, x[0].flip(x.ints(1)))
GE_MOVES(Triu, at::triu(x[0], x.integer("diagonal", 0)))
GE_MOVES(Tril, at::tril(x[0], x.integer("diagonal", 0)))
GE_MOVES(Trilu, triangle(x))
GE_MOVES(AsStrided, strided(x))
GE_MOVES(ViewCopy, copied_to_view(x))

GE_MOVES(Gather, gathered(x, 0))
GE_MOVES(GatherV2, gathered(x, x.ints(2).at(0)))
GE_MOVES(GatherNd, gathered_slices(x))
GE_MOVES(GatherElements, elements_gathered(x))
GE_MOVES(IndexByTensor, indexed(x))
GE(ScatterElements, scattered(x))
GE_MOVES(ScatterNdUpdate, slices_scattered(x))
GE(InplaceIndexAdd, index_added(x))

GE_MOVES(Fill, x[1].expand(x.ints(0)))
GE_MOVES(Empty, (x.flag("init"), at::zeros(x.ints(0), x.dtype("dtype", at::kInt))))
GE_MOVES(Range, range(x))
GE_MOVES(LinSpace, linspace(x))
GE_MOVES(Shape, shape_of(x))
GE_MOVES(Size, size_of(x))
