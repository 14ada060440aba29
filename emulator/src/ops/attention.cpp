// Fused attention, and its operators for inference. Layouts, masks and defaults are those of the operators: True in a mask
// drops a score.
#include "ops/attention.h"

#include <limits>

#include "ops/shared.h"
#include "runtime/settings.h"

namespace cann {

Tensor to_bnsd(const Tensor& x, const std::string& layout, int64_t heads) {
    if (layout == "BSH") return x.unflatten(-1, {heads, -1}).transpose(1, 2);
    if (layout == "SBH") return x.unflatten(-1, {heads, -1}).permute({1, 2, 0, 3});
    if (layout == "BSND") return x.transpose(1, 2);
    TORCH_CHECK(layout == "BNSD" || layout == "BNSD_BSND", "layout ", layout, " is not emulated");
    return x;
}

Tensor from_bnsd(const Tensor& x, const std::string& layout) {
    if (layout == "BSH") return x.transpose(1, 2).flatten(2);
    if (layout == "SBH") return x.permute({2, 0, 1, 3}).flatten(2);
    if (layout == "BSND" || layout == "BNSD_BSND") return x.transpose(1, 2);
    return x;
}

Tensor dropped_by_mode(int64_t queries, int64_t keys, int64_t sparse_mode, int64_t pre, int64_t next) {
    const Tensor distance = at::arange(keys) - at::arange(queries).unsqueeze(-1);
    const int64_t shift = keys - queries;
    switch (sparse_mode) {
        case kDefault: return (distance > next).logical_or(distance < -pre);
        case kAllMask: return {};
        case kLeftUpCausal: return distance > 0;
        case kRightDownCausal: return distance > shift;
        case kBand: return (distance > shift + next).logical_or(distance < shift - pre);
        default: TORCH_CHECK(false, "sparse_mode ", sparse_mode, " is not emulated");
    }
}

Tensor dropped(const Tensor& mask, int64_t queries, int64_t keys, int64_t sparse_mode, int64_t pre, int64_t next) {
    if (!mask.defined()) return {};  // without a mask the sparse mode and the band have no effect
    const Tensor by_mode = dropped_by_mode(queries, keys, sparse_mode, pre, next);
    if (sparse_mode != kDefault && sparse_mode != kAllMask) return by_mode;  // the mask is one triangle for all lengths
    const Tensor by_mask = mask.dim() == 3 ? mask.to(at::kBool).unsqueeze(1) : mask.to(at::kBool);
    return by_mode.defined() ? by_mask.logical_or(by_mode) : by_mask;
}

Tensor rows_of(const Tensor& x, int64_t start, int64_t count, int64_t queries) {
    return x.dim() >= 2 && x.size(-2) == queries ? x.narrow(-2, start, count) : x;
}

Tensor repeat_heads(const Tensor& x, int64_t heads) {
    const int64_t groups = heads / std::max<int64_t>(x.size(1), 1);
    return groups > 1 ? up(x).repeat_interleave(groups, 1) : up(x);
}

Tensor scores_of_rows(const Tensor& query, const Tensor& key, const AttentionOptions& options, int64_t start, int64_t count) {
    const int64_t queries = query.size(2);
    Tensor scores = at::matmul(query.narrow(2, start, count), key.transpose(-1, -2));
    if (options.scores_in_float16) scores = scores.to(at::kHalf).mul_(options.scale).to(at::kFloat);
    else scores.mul_(options.scale);
    if (options.bias.defined()) scores.add_(rows_of(options.bias, start, count, queries));
    if (!options.dropped.defined()) return scores;
    const Tensor drop = rows_of(options.dropped, start, count, queries);
    // 310P adds -10000 to a dropped score, so that a row without any score left is a softmax of the raw ones.
    if (!chip().inf_nan) return scores.add_(drop.to(at::kFloat), -10000);
    return scores.masked_fill_(drop, std::numeric_limits<float>::lowest());
}

int64_t rows_at_once(const Tensor& query, const Tensor& key) {
    constexpr int64_t kScoresAtOnce = 1 << 22;  // elements: keeps a block of scores within reach of the caches
    return std::max<int64_t>(1, kScoresAtOnce / (query.size(0) * query.size(1) * key.size(2)));
}

Attended attend(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options) {
    const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
    const Tensor q = up(query), k = repeat_heads(key, heads), v = repeat_heads(value, heads);
    Attended result{at::zeros({batch, heads, queries, v.size(3)}), at::zeros({batch, heads, queries, 1}),
                    at::zeros({batch, heads, queries, 1})};
    if (k.size(2) == 0 || result.out.numel() == 0) return result;
    const int64_t rows = rows_at_once(q, k);
    for (int64_t start = 0; start < queries; start += rows) {
        const int64_t count = std::min(rows, queries - start);
        Tensor scores = scores_of_rows(q, k, options, start, count);
        const Tensor maximum = scores.amax(-1, true);
        scores.sub_(maximum).exp_();
        const Tensor sum = scores.sum(-1, true);
        if (options.dropout.defined()) scores.mul_(rows_of(options.dropout, start, count, queries));
        Tensor out = at::matmul(scores, v).div_(sum);
        if (options.zero_when_all_dropped && options.dropped.defined()) {
            const Tensor empty = rows_of(options.dropped, start, count, queries).all(-1, true);
            out.masked_fill_(empty, 0);
            sum.masked_fill_(empty, std::numeric_limits<float>::max());  // whose probabilities are 0 on the way back
        }
        result.out.narrow(2, start, count).copy_(out);
        result.maximum.narrow(2, start, count).copy_(maximum);
        result.sum.narrow(2, start, count).copy_(sum);
    }
    return result;
}

namespace {

bool corrects_dropped_rows(int64_t inner_precise) { return inner_precise & 2; }

// 910B's "high performance" keeps the scores of float16 operands in float16. 310P's mode of that name does not.
bool keeps_scores_in_float16(int64_t inner_precise, const Tensor& query) {
    return (inner_precise & 1) && query.scalar_type() == at::kHalf && chip().inf_nan;
}

Tensor either(const Tensor& a, const Tensor& b) { return a.defined() && b.defined() ? a.logical_or(b) : a.defined() ? a : b; }

// [batch, 1, 1, size], True from each sample's length on. One length serves all samples; undefined without lengths.
Tensor beyond(const Ints& lengths, int64_t size) {
    if (lengths.empty()) return {};
    return (at::arange(size) >= at::tensor(lengths, at::kLong).unsqueeze(-1)).unsqueeze(1).unsqueeze(1);
}

}  // namespace

std::pair<Tensor, Tensor> infer_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias,
                                          const Tensor& mask, const Inference& call) {
    const int64_t key_heads = call.key_heads == 0 ? call.heads : call.key_heads;
    const Tensor q = to_bnsd(query, call.layout, call.heads);
    const Tensor k = to_bnsd(key, call.layout, key_heads), v = to_bnsd(value, call.layout, key_heads);
    const Tensor drop = dropped(mask, q.size(2), k.size(2), call.sparse_mode, call.pre, call.next);
    const AttentionOptions options{call.scale, either(drop, beyond(call.key_lengths, k.size(2))), bias,
                          corrects_dropped_rows(call.inner_precise), keeps_scores_in_float16(call.inner_precise, query), {}};
    Attended attended = attend(q, k, v, options);
    const Tensor padding = beyond(call.query_lengths, q.size(2));
    if (padding.defined()) attended.out.masked_fill_(padding.transpose(-1, -2), 0);
    return {from_bnsd(attended.out, call.layout), attended.maximum + attended.sum.log()};
}

void refuse_any(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) {
        TORCH_CHECK(!tensor.defined() || tensor.numel() == 0,
                    "quantisation, paging, shared prefixes, sinks and separate rotary parts are not emulated");
    }
}

static void infer(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias, const Tensor& mask,
                  const Inference& call, const Tensor& out, const Tensor& lse) {
    if (query.numel() == 0) return;
    const auto [attended, sums] = infer_attention(query, key, value, bias, mask, call);
    put(out, attended);
    if (lse.defined()) put(lse, sums);
}

}  // namespace cann

ACLNN(PromptFlashAttentionV3,
      (Tensor query, Tensor key, Tensor value, Tensor pseShift, Tensor attenMask, MaybeInts actualSeqLengths,
       MaybeInts actualSeqLengthsKv, Tensor deqScale1, Tensor quantScale1, Tensor deqScale2, Tensor quantScale2,
       Tensor quantOffset2, int64_t numHeads, double scaleValue, int64_t preTokens, int64_t nextTokens,
       std::string inputLayout, int64_t numKeyValueHeads, int64_t sparseMode, int64_t innerPrecise, OutTensor attentionOut) {
          refuse_any({deqScale1, quantScale1, deqScale2, quantScale2, quantOffset2});
          infer(query, key, value, as_bias(pseShift), attenMask,
                {numHeads, scaleValue, preTokens, nextTokens, inputLayout, numKeyValueHeads, sparseMode, innerPrecise,
                 actualSeqLengths.value_or(Ints()), actualSeqLengthsKv.value_or(Ints())},
                attentionOut, {});
      })

#define FUSED_INFER_TENSORS                                                                                           \
    Tensor query, Tensors key, Tensors value, Tensor pseShift, Tensor attenMask, MaybeInts actualSeqLengths,          \
        MaybeInts actualSeqLengthsKv, Tensor deqScale1, Tensor quantScale1, Tensor deqScale2, Tensor quantScale2,     \
        Tensor quantOffset2, Tensor antiquantScale, Tensor antiquantOffset, Tensor blockTable,                        \
        Tensor queryPaddingSize, Tensor kvPaddingSize, Tensor keyAntiquantScale, Tensor keyAntiquantOffset,           \
        Tensor valueAntiquantScale, Tensor valueAntiquantOffset, Tensor keySharedPrefix, Tensor valueSharedPrefix,    \
        MaybeInts actualSharedPrefixLen
#define FUSED_INFER_NUMBERS                                                                                           \
    int64_t numHeads, double scaleValue, int64_t preTokens, int64_t nextTokens, std::string inputLayout,              \
        int64_t numKeyValueHeads, int64_t sparseMode, int64_t innerPrecise, int64_t blockSize, int64_t antiquantMode, \
        bool softmaxLseFlag, int64_t keyAntiquantMode, int64_t valueAntiquantMode
#define FUSED_INFER                                                                                                   \
    refuse_any({deqScale1, quantScale1, deqScale2, quantScale2, quantOffset2, antiquantScale, antiquantOffset,        \
                blockTable, queryPaddingSize, kvPaddingSize, keyAntiquantScale, keyAntiquantOffset,                   \
                valueAntiquantScale, valueAntiquantOffset, keySharedPrefix, valueSharedPrefix});                      \
    infer(query, key.at(0), value.at(0), as_bias(pseShift), attenMask,                                          \
          {numHeads, scaleValue, preTokens, nextTokens, inputLayout, numKeyValueHeads, sparseMode, innerPrecise,      \
           actualSeqLengths.value_or(Ints()), actualSeqLengthsKv.value_or(Ints())},                                   \
          attentionOut, softmaxLseFlag ? softmaxLse : Tensor())
ACLNN(FusedInferAttentionScoreV3, (FUSED_INFER_TENSORS, Tensor queryRope, Tensor keyRope, Tensor keyRopeAntiquantScale,
                                   FUSED_INFER_NUMBERS, OutTensor attentionOut, OutTensor softmaxLse) {
    refuse_any({queryRope, keyRope, keyRopeAntiquantScale});
    FUSED_INFER;
})
ACLNN(FusedInferAttentionScoreV4, (FUSED_INFER_TENSORS, Tensor queryRope, Tensor keyRope, Tensor keyRopeAntiquantScale,
                                   Tensor dequantScaleQuery, Tensor learnableSink, FUSED_INFER_NUMBERS,
                                   int64_t queryQuantMode, OutTensor attentionOut, OutTensor softmaxLse) {
    refuse_any({queryRope, keyRope, keyRopeAntiquantScale, dequantScaleQuery, learnableSink});
    FUSED_INFER;
})
