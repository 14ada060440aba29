// Operators that move elements: nothing is rounded and nothing saturates.
#include "ops/operator.h"

#define MOVE(NAME, PARAMETERS, ...) ACLNN(NAME, (STRIP PARAMETERS, OutTensor out) { move(out, __VA_ARGS__); })
#define MOVE_INPLACE(NAME, PARAMETERS, ...) ACLNN(Inplace##NAME, (FIRST_IS_OUT PARAMETERS) { move(self, __VA_ARGS__); })
#define MOVE_BOTH(NAME, PARAMETERS, ...) \
    MOVE(NAME, PARAMETERS, __VA_ARGS__) MOVE_INPLACE(NAME, PARAMETERS, __VA_ARGS__)

namespace cann {
namespace {

// torch_npu passes a dimension that is not indexed as an empty tensor of self's dtype.
c10::List<std::optional<Tensor>> index_list(const Tensors& indices, bool result_is_empty) {
    c10::List<std::optional<Tensor>> list;
    for (const Tensor& index : indices) {
        const bool selects = index.defined() && at::isIntegralType(index.scalar_type(), true);
        const bool whole = !selects || (index.numel() == 0 && !result_is_empty);
        list.push_back(whole ? std::nullopt : std::optional(index));
    }
    return list;
}

// `source` is a tensor or a number.
template <class Source>
Tensor scatter(const Tensor& self, int64_t dim, const Tensor& index, const Source& source, int64_t reduce) {
    TORCH_CHECK(reduce == 0, "reduction ", reduce, " is not emulated: torch_npu reduces on the CPU");
    return at::scatter(self, dim, index, source);
}
Tensor scatter_reduce(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source, int64_t reduce,
                      bool include_self) {
    constexpr const char* kNames[] = {"", "sum", "prod", "amax", "amin", "mean"};
    TORCH_CHECK(reduce >= 0 && reduce < 6, "reduction ", reduce, " is not known");
    if (reduce == 0) return at::scatter(self, dim, index, source);
    return at::scatter_reduce(self, dim, index, source, kNames[reduce], include_self);
}

}  // namespace
}  // namespace cann

FUNCTION(Cat, (Tensors tensors, int64_t dim), at::cat(tensors, dim))
FUNCTION(Stack, (Tensors tensors, int64_t dim), at::stack(tensors, dim))
ACLNN(SplitWithSize, (Tensor self, Ints sizes, int64_t dim, OutTensors out) {
    const auto parts = at::split_with_sizes(self, sizes, dim);
    for (size_t i = 0; i < parts.size(); ++i) move(out[i], parts[i]);
})
FUNCTION(ChunkCat, (Tensors tensors, int64_t dim, int64_t numChunks), at::_chunk_cat(tensors, dim, numChunks))
MOVE(Flip, (Tensor self, Ints dims), at::flip(self, dims))
MOVE(Roll, (Tensor x, Ints shifts, Ints dims), at::roll(x, shifts, dims))
MOVE(Repeat, (Tensor self, Ints repeats), self.repeat(repeats))
MOVE(RepeatInterleave, (Tensor self, Tensor repeats, int64_t output_size), at::repeat_interleave(self, repeats.to(at::kLong)))
MOVE(RepeatInterleaveWithDim, (Tensor self, Tensor repeats, int64_t dim, int64_t output_size),
     at::repeat_interleave(self, repeats.to(at::kLong), dim))
MOVE(RepeatInterleaveInt, (Tensor self, int64_t repeats, int64_t output_size), at::repeat_interleave(self, repeats))
MOVE(RepeatInterleaveIntWithDim, (Tensor self, int64_t repeats, int64_t dim, int64_t output_size),
     at::repeat_interleave(self, repeats, dim))
MOVE(RepeatInterleaveTensor, (Tensor repeats, int64_t output_size), at::repeat_interleave(repeats.to(at::kLong)))
MOVE(ConstantPadNd, (Tensor self, Ints pad, Scalar value), at::constant_pad_nd(self, pad, value))
MOVE(ChannelShuffle, (Tensor self, int64_t groups), at::channel_shuffle(self, groups))

MOVE(Embedding, (Tensor weight, Tensor indices), at::embedding(weight, indices))
FUNCTION(EmbeddingDenseBackward,
         (Tensor grad, Tensor indices, int64_t numWeights, int64_t paddingIdx, bool scaleGradByFreq),
         at::embedding_dense_backward(up(grad), indices.to(at::kLong), numWeights, paddingIdx, scaleGradByFreq))
FUNCTION(UnfoldGrad, (Tensor gradOut, Ints inputSizes, int64_t dim, int64_t size, int64_t step),
         at::unfold_backward(up(gradOut), inputSizes, dim, size, step))
MOVE(Gather, (Tensor self, int64_t dim, Tensor index), at::gather(self, dim, index.to(at::kLong)))
MOVE(Take, (Tensor self, Tensor index), at::take(self, index.to(at::kLong)))
MOVE(IndexSelect, (Tensor self, int64_t dim, Tensor index), at::index_select(self, dim, index))
MOVE(Index, (Tensor self, Tensors indices), at::index(self, index_list(indices, out.numel() == 0)))
ACLNN(IndexPutImpl, (OutTensor self, Tensors indices, Tensor values, bool accumulate, bool unsafe) {
    put(self, at::index_put(self, index_list(indices, values.numel() == 0), values.to(self.dtype()), accumulate));
})
ACLNN(InplacePut, (OutTensor self, Tensor index, Tensor source, bool accumulate) {
    put(self, at::put(self, index.to(at::kLong), source, accumulate));
})
FUNCTION(IndexAdd, (Tensor self, int64_t dim, Tensor index, Tensor source, Scalar alpha),
         at::index_add(self, dim, index, source, alpha))
MOVE_BOTH(IndexCopy, (Tensor self, int64_t dim, Tensor index, Tensor source), at::index_copy(self, dim, index.to(at::kLong), source))
MOVE_BOTH(IndexFill, (Tensor self, int64_t dim, Tensor index, Scalar value), at::index_fill(self, dim, index.to(at::kLong), value))

BOTH(Scatter, (Tensor self, int64_t dim, Tensor index, Tensor src, int64_t reduce),
     scatter(self, dim, index.to(at::kLong), src, reduce))
BOTH(ScatterValue, (Tensor self, int64_t dim, Tensor index, Scalar value, int64_t reduce),
     scatter(self, dim, index.to(at::kLong), value, reduce))
FUNCTION(ScatterAdd, (Tensor self, int64_t dim, Tensor index, Tensor src), at::scatter_add(self, dim, index.to(at::kLong), src))
BOTH(ScatterReduce, (Tensor self, int64_t dim, Tensor index, Tensor src, int64_t reduce, bool include_self),
     scatter_reduce(self, dim, index.to(at::kLong), src, reduce, include_self))

MOVE_INPLACE(MaskedFillScalar, (Tensor self, Tensor mask, Scalar value), at::masked_fill(self, mask.to(at::kBool), value))
MOVE_INPLACE(MaskedFillTensor, (Tensor self, Tensor mask, Tensor value), at::masked_fill(self, mask.to(at::kBool), value.reshape({})))
MOVE_INPLACE(MaskedScatter, (Tensor self, Tensor mask, Tensor source), at::masked_scatter(self, mask.to(at::kBool), source))
ACLNN(MaskedSelect, (Tensor self, Tensor mask, Resizable out) { out.set(at::masked_select(self, mask.to(at::kBool))); })
ACLNN(Nonzero, (Tensor self, Resizable out) { out.set(at::nonzero(self)); })
ACLNN(NonzeroV2, (Tensor self, Resizable out) { out.set(at::nonzero(self).t()); })
