// Fused attention. Layouts, masks and defaults are those of the operators: True in a mask drops a score.
#include <limits>

#include "ops/operator.h"
#include "ops/shared.h"
#include "runtime/settings.h"

namespace cann {
namespace {

constexpr int64_t kScoresAtOnce = 1 << 22;  // elements: keeps a block of scores within reach of the caches

// Between [tokens, heads, head_dim] and [1, heads, tokens, head_dim], for one sequence.
Tensor from_tnd(const Tensor& x) { return x.transpose(0, 1).unsqueeze(0); }
Tensor to_tnd(const Tensor& x) { return x.squeeze(0).transpose(0, 1); }

// [batch, heads, length, head_dim]
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

enum SparseMode { kDefault = 0, kAllMask = 1, kLeftUpCausal = 2, kRightDownCausal = 3, kBand = 4 };

// Where scores are dropped, broadcastable to [batch, heads, queries, keys]; undefined when nowhere.
Tensor dropped(const Tensor& mask, int64_t queries, int64_t keys, int64_t sparse_mode, int64_t pre, int64_t next) {
    if (!mask.defined()) return {};  // without a mask the sparse mode and the band have no effect
    const Tensor distance = at::arange(keys) - at::arange(queries).unsqueeze(-1);
    const int64_t shift = keys - queries;
    switch (sparse_mode) {
        case kLeftUpCausal: return distance > 0;
        case kRightDownCausal: return distance > shift;
        case kBand: return (distance > shift + next).logical_or(distance < shift - pre);
        default: break;
    }
    Tensor whole = mask.to(at::kBool);
    if (whole.dim() == 3) whole = whole.unsqueeze(1);
    if (sparse_mode == kAllMask) return whole;
    TORCH_CHECK(sparse_mode == kDefault, "sparse_mode ", sparse_mode, " is not emulated");
    return whole.logical_or(distance > next).logical_or(distance < -pre);
}

struct Attended {
    Tensor out, maximum, sum;  // float32: [batch, heads, queries, head_dim] and twice [batch, heads, queries, 1]
};

struct Options {
    double scale;
    Tensor dropped;         // bool
    Tensor bias;            // added to the scores before the scale of the mask
    bool zero_when_all_dropped = false;
    bool scores_in_float16 = false;
    Tensor dropout;         // what probabilities are multiplied with: 0, or 1 / keep_prob
};

Attended attend(const Tensor& query, const Tensor& key, const Tensor& value, const Options& options) {
    const int64_t groups = query.size(1) / std::max<int64_t>(key.size(1), 1);
    const auto repeated = [groups](const Tensor& x) { return groups > 1 ? up(x).repeat_interleave(groups, 1) : up(x); };
    const Tensor q = up(query), k = repeated(key).transpose(-1, -2), v = repeated(value);
    const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(3);
    Attended result{at::zeros({batch, heads, queries, v.size(3)}), at::zeros({batch, heads, queries, 1}),
                    at::zeros({batch, heads, queries, 1})};
    if (keys == 0 || result.out.numel() == 0) return result;

    // 310P adds -10000 to a dropped score, so that a row without any score left is a softmax of the raw ones.
    const bool additive = !chip().inf_nan;
    const int64_t rows = std::max<int64_t>(1, kScoresAtOnce / (batch * heads * keys));
    const auto part = [&](const Tensor& x, int64_t start, int64_t count) {
        return x.dim() >= 2 && x.size(-2) == queries ? x.narrow(-2, start, count) : x;
    };
    for (int64_t start = 0; start < queries; start += rows) {
        const int64_t count = std::min(rows, queries - start);
        Tensor scores = at::matmul(q.narrow(2, start, count), k);
        if (options.scores_in_float16) scores = scores.to(at::kHalf).mul_(options.scale).to(at::kFloat);
        else scores.mul_(options.scale);
        if (options.bias.defined()) scores.add_(part(options.bias, start, count));
        Tensor drop;
        if (options.dropped.defined()) {
            drop = part(options.dropped, start, count);
            if (additive) scores.add_(drop.to(at::kFloat), -10000);
            else scores.masked_fill_(drop, std::numeric_limits<float>::lowest());
        }
        const Tensor maximum = scores.amax(-1, true);
        scores.sub_(maximum).exp_();
        const Tensor sum = scores.sum(-1, true);
        if (options.dropout.defined()) scores.mul_(part(options.dropout, start, count));
        Tensor out = at::matmul(scores, v).div_(sum);
        if (options.zero_when_all_dropped && drop.defined()) {
            out.masked_fill_(drop.all(-1, true), 0);
        }
        result.out.narrow(2, start, count).copy_(out);
        result.maximum.narrow(2, start, count).copy_(maximum);
        result.sum.narrow(2, start, count).copy_(sum);
    }
    return result;
}

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

// The statistics that the backward pass reads: float32, eight equal values a row.
void put_statistics(const Tensor& out, const Tensor& rows) { move(out, rows.repeat_interleave(out.size(-1), -1)); }

Tensor as_bias(const Tensor& bias) { return bias.defined() ? up(bias) : bias; }

// The factors of the probabilities from a bit for each, the lowest of a byte first; undefined without dropout.
Tensor dropout(const Tensor& bits, double keep, at::IntArrayRef shape) {
    if (!bits.defined()) return {};
    return unpack_bits(bits, shape).to(at::kFloat).div_(keep);
}

}  // namespace

void training_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias, const Tensor& drop_mask,
                        const Tensor& mask, double scale, double keep, int64_t pre, int64_t next, int64_t heads,
                        const std::string& layout, int64_t inner_precise, int64_t sparse_mode, const Tensor& maximum,
                        const Tensor& sum, const Tensor& out) {
    if (query.numel() == 0) return;
    const bool split = layout == "BSND" || layout == "BNSD";
    const Tensor q = to_bnsd(query, layout, heads);
    const int64_t key_heads = split ? (layout == "BNSD" ? key.size(1) : key.size(2)) : key.size(-1) / q.size(3);
    const Tensor k = to_bnsd(key, layout, key_heads), v = to_bnsd(value, layout, key_heads);
    const Options options{scale, dropped(mask, q.size(2), k.size(2), sparse_mode, pre, next), as_bias(bias),
                          corrects_dropped_rows(inner_precise), keeps_scores_in_float16(inner_precise, query),
                          dropout(drop_mask, keep, {q.size(0), q.size(1), q.size(2), k.size(2)})};
    const Attended attended = attend(q, k, v, options);
    put(out, from_bnsd(attended.out, layout));
    put_statistics(maximum, attended.maximum);
    put_statistics(sum, attended.sum);
}

namespace {

// Sequences of different lengths, one after the other: [tokens, heads, head_dim] and cumulative lengths. The statistics
// of a sequence are [heads, tokens, 8] in any case, unless `statistics_as_input`.
void packed_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask, const Ints& query_ends,
                      const Ints& key_ends, double scale, int64_t pre, int64_t next, int64_t inner_precise, int64_t sparse_mode,
                      bool statistics_as_input, const Tensor& maximum, const Tensor& sum, const Tensor& out) {
    TORCH_CHECK(query_ends.size() == key_ends.size(), "there are ", query_ends.size(), " query lengths and ", key_ends.size(),
                " key lengths");
    int64_t query_start = 0, key_start = 0;
    for (size_t i = 0; i < query_ends.size(); ++i) {
        const auto sequence = [](const Tensor& x, int64_t start, int64_t end) {
            return from_tnd(x.narrow(0, start, end - start));
        };
        const Tensor q = sequence(query, query_start, query_ends[i]);
        const Tensor k = sequence(key, key_start, key_ends[i]), v = sequence(value, key_start, key_ends[i]);
        const Options options{scale, dropped(mask, q.size(2), k.size(2), sparse_mode, pre, next), {},
                              corrects_dropped_rows(inner_precise), keeps_scores_in_float16(inner_precise, query), {}};
        const Attended attended = attend(q, k, v, options);
        const auto part = [&](const Tensor& x) { return x.narrow(0, query_start, q.size(2)); };
        put(part(out), to_tnd(attended.out));
        const auto rows = [&](const Tensor& x) { return statistics_as_input ? to_tnd(x) : x.squeeze(0); };
        put_statistics(part(maximum), rows(attended.maximum));
        put_statistics(part(sum), rows(attended.sum));
        query_start = query_ends[i];
        key_start = key_ends[i];
    }
}

}  // namespace
std::pair<Tensor, Tensor> infer_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias,
                                          const Tensor& mask, const Inference& call) {
    const int64_t key_heads = call.key_heads == 0 ? call.heads : call.key_heads;
    const Tensor q = to_bnsd(query, call.layout, call.heads);
    const Tensor k = to_bnsd(key, call.layout, key_heads), v = to_bnsd(value, call.layout, key_heads);
    const Tensor drop = dropped(mask, q.size(2), k.size(2), call.sparse_mode, call.pre, call.next);
    const Options options{call.scale, either(drop, beyond(call.key_lengths, k.size(2))), bias,
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

#define FLASH_TENSORS \
    Tensor query, Tensor key, Tensor value, Tensor realShift, Tensor dropMask, Tensor paddingMask, Tensor attenMask
#define FLASH_NUMBERS                                                                                           \
    double scaleValue, double keepProb, int64_t preTokens, int64_t nextTokens, int64_t headNum, std::string inputLayout, \
        int64_t innerPrecise, int64_t sparseMode
#define FLASH_RESULTS OutTensor softmaxMax, OutTensor softmaxSum, OutTensor softmaxOut, OutTensor attentionOut
#define FLASH                                                                                                        \
    training_attention(query, key, value, realShift, dropMask, attenMask, scaleValue, keepProb, preTokens, nextTokens, \
                       headNum, inputLayout, innerPrecise, sparseMode, softmaxMax, softmaxSum, attentionOut)
ACLNN(FlashAttentionScore, (FLASH_TENSORS, MaybeInts prefix, FLASH_NUMBERS, FLASH_RESULTS) { FLASH; })
ACLNN(FlashAttentionScoreV2, (FLASH_TENSORS, MaybeInts prefix, MaybeInts qStartIdx, MaybeInts kvStartIdx, FLASH_NUMBERS,
                              int64_t pseType, FLASH_RESULTS) {
    constexpr int64_t kScaleThenAdd = 1;
    TORCH_CHECK(!realShift.defined() || pseType == kScaleThenAdd, "pse_type ", pseType, " is not emulated");
    FLASH;
})
#define PACKED(STATISTICS_AS_INPUT)                                                                                \
    TORCH_CHECK(!realShift.defined() && !dropMask.defined() && keepProb == 1,                                      \
                "a bias and dropout of packed sequences are not emulated");                                        \
    packed_attention(query, key, value, attenMask, actualSeqQLen, actualSeqKvLen, scaleValue, preTokens, nextTokens, \
                     innerPrecise, sparseMode, STATISTICS_AS_INPUT, softmaxMax, softmaxSum, attentionOut)
ACLNN(FlashAttentionVarLenScore, (FLASH_TENSORS, MaybeInts prefix, Ints actualSeqQLen, Ints actualSeqKvLen, FLASH_NUMBERS,
                                  FLASH_RESULTS) { PACKED(false); })
ACLNN(FlashAttentionVarLenScoreV4, (FLASH_TENSORS, MaybeInts prefix, Ints actualSeqQLen, Ints actualSeqKvLen, FLASH_NUMBERS,
                                    std::string softmaxOutLayout, FLASH_RESULTS) { PACKED(softmaxOutLayout == "same_as_input"); })
