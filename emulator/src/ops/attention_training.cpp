// Fused attention for training, and its way back: both recompute the scores, and the statistics of the softmax go from the
// one to the other. Ascend's formulas are in ops-transformer, attention/flash_attention_score_grad/docs.
#include <limits>

#include "ops/attention.h"
#include "ops/shared.h"

namespace cann {
namespace {

AttentionOptions options_of(const Tensor& query, const Tensor& key, const Tensor& bias, const Tensor& mask,
                            const Tensor& dropout, const Training& call) {
    constexpr int64_t kScaleThenAdd = 0, kAddThenScale = 1, kCorrectsDroppedRows = 2;
    const int64_t queries = query.size(2), keys = key.size(2);
    AttentionOptions options{call.scale, dropped(mask, queries, keys, call.sparse_mode, call.pre, call.next),
                             as_bias(bias), call.inner_precise == kCorrectsDroppedRows, false, dropout};
    TORCH_CHECK(!bias.defined() || call.bias_type == kScaleThenAdd || call.bias_type == kAddThenScale, "pse_type ",
                call.bias_type, " is not emulated");
    if (bias.defined() && call.bias_type == kAddThenScale) options.bias = options.bias * call.scale;
    if (mask.defined() && queries > 0 && keys > 0) {  // the operator sees by itself that a mode leaves rows without keys
        const Tensor by_mode = dropped_by_mode(queries, keys, call.sparse_mode, call.pre, call.next);
        options.zero_when_all_dropped |= by_mode.defined() && by_mode.all(-1).any().item<bool>();
    }
    return options;
}

// The factors of the probabilities from a bit for each, the lowest of a byte first; undefined without dropout.
Tensor dropout(const Tensor& bits, double keep, at::IntArrayRef shape) {
    if (!bits.defined()) return {};
    return unpack_bits(bits, shape).to(at::kFloat).div_(keep);
}

int64_t key_heads(const Tensor& key, const Tensor& query, const std::string& layout) {
    if (layout == "BNSD") return key.size(1);
    return layout == "BSND" ? key.size(2) : key.size(-1) / query.size(3);  // query in [batch, heads, length, head_dim]
}

// The statistics of the softmax: float32, eight equal values a row.
void put_statistics(const Tensor& out, const Tensor& rows) { move(out, rows.repeat_interleave(out.size(-1), -1)); }
Tensor statistics(const Tensor& kept) { return kept.narrow(-1, 0, 1); }

struct AttentionGradients {
    Tensor query, key, value;
};

// From the gradient of `attended.out`; all in the layout [batch, heads, length, head_dim].
AttentionGradients attend_backward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad,
                                   const Attended& attended, const AttentionOptions& options) {
    const int64_t heads = query.size(1), queries = query.size(2);
    const Tensor q = up(query), k = repeat_heads(key, heads), v = repeat_heads(value, heads), of_out = up(grad);
    const Tensor inner = (of_out * up(attended.out)).sum(-1, true);
    AttentionGradients result{at::zeros_like(q), at::zeros_like(k), at::zeros_like(v)};
    const int64_t rows = rows_at_once(q, k);
    for (int64_t start = 0; start < queries; start += rows) {
        const int64_t count = std::min(rows, queries - start);
        const auto part = [&](const Tensor& x) { return rows_of(x, start, count, queries); };
        const Tensor shares = (scores_of_rows(q, k, options, start, count) - part(attended.maximum)).exp_().div_(part(attended.sum));
        Tensor kept = shares, of_shares = at::matmul(part(of_out), v.transpose(-1, -2));
        if (options.dropout.defined()) {
            kept = shares * part(options.dropout);
            of_shares.mul_(part(options.dropout));
        }
        const Tensor of_scores = of_shares.sub_(part(inner)).mul_(shares).mul_(options.scale);
        result.value.add_(at::matmul(kept.transpose(-1, -2), part(of_out)));
        result.key.add_(at::matmul(of_scores.transpose(-1, -2), part(q)));
        result.query.narrow(2, start, count).copy_(at::matmul(of_scores, k));
    }
    // Queries that share a key head add to its gradient.
    const auto shared = [](const Tensor& x, const Tensor& like) { return x.unflatten(1, {like.size(1), -1}).sum(2); };
    return {result.query, shared(result.key, key), shared(result.value, value)};
}

}  // namespace

void training_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias, const Tensor& drop_mask,
                        const Tensor& mask, const Training& call, const Tensor& maximum, const Tensor& sum, const Tensor& out) {
    if (query.numel() == 0) return;
    const Tensor q = to_bnsd(query, call.layout, call.heads);
    const int64_t shared = key_heads(key, q, call.layout);
    const Tensor k = to_bnsd(key, call.layout, shared), v = to_bnsd(value, call.layout, shared);
    const Tensor factors = dropout(drop_mask, call.keep, {q.size(0), q.size(1), q.size(2), k.size(2)});
    const Attended attended = attend(q, k, v, options_of(q, k, bias, mask, factors, call));
    put(out, from_bnsd(attended.out, call.layout));
    put_statistics(maximum, attended.maximum);
    put_statistics(sum, attended.sum);
}

namespace {

struct Kept {
    const Tensor &maximum, &sum, &out;
};
struct Wanted {
    const Tensor &query, &key, &value, &bias;
};

// The operator has an output for the gradient of the bias and does not write it ("not used yet"): NaN instead of whatever
// the memory holds.
void leave_out(const Tensor& of_bias) {
    if (of_bias.defined()) of_bias.fill_(std::numeric_limits<double>::quiet_NaN());
}

void training_attention_backward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad,
                                 const Tensor& bias, const Tensor& drop_mask, const Tensor& mask, const Training& call,
                                 const Kept& kept, const Wanted& wanted) {
    leave_out(wanted.bias);
    if (query.numel() == 0) return;
    const Tensor q = to_bnsd(query, call.layout, call.heads);
    const int64_t shared = key_heads(key, q, call.layout);
    const Tensor k = to_bnsd(key, call.layout, shared), v = to_bnsd(value, call.layout, shared);
    const Tensor factors = dropout(drop_mask, call.keep, {q.size(0), q.size(1), q.size(2), k.size(2)});
    const auto of_queries = [&](const Tensor& x) { return to_bnsd(x, call.layout, call.heads); };
    const Attended attended{of_queries(kept.out), statistics(kept.maximum), statistics(kept.sum)};
    const AttentionGradients gradients =
        attend_backward(q, k, v, of_queries(grad), attended, options_of(q, k, bias, mask, factors, call));
    put(wanted.query, from_bnsd(gradients.query, call.layout));
    put(wanted.key, from_bnsd(gradients.key, call.layout));
    put(wanted.value, from_bnsd(gradients.value, call.layout));
}

// ---- sequences of different lengths, one after the other: [tokens, heads, head_dim] and cumulative lengths ----
struct Sequence {
    int64_t query_start, queries, key_start, keys, first_share;  // the last counts probabilities, for dropout

    Tensor of_queries(const Tensor& x) const { return x.narrow(0, query_start, queries); }
    Tensor of_keys(const Tensor& x) const { return x.narrow(0, key_start, keys); }
    // The statistics are [heads, tokens, 8] for each sequence in any case, unless `as_input`.
    Tensor statistics(const Tensor& x, bool as_input) const {
        return as_input ? from_tnd(of_queries(x)) : of_queries(x).reshape({1, x.size(1), queries, x.size(2)});
    }
    void put_statistics(const Tensor& out, const Tensor& rows, bool as_input) const {
        cann::put_statistics(of_queries(out), as_input ? to_tnd(rows) : rows.squeeze(0));
    }
};

std::vector<Sequence> sequences(const Ints& query_ends, const Ints& key_ends, int64_t heads) {
    TORCH_CHECK(query_ends.size() == key_ends.size(), "there are ", query_ends.size(), " query lengths and ", key_ends.size(),
                " key lengths");
    std::vector<Sequence> found;
    Sequence next{0, 0, 0, 0, 0};
    for (size_t i = 0; i < query_ends.size(); ++i) {
        next.queries = query_ends[i] - next.query_start;
        next.keys = key_ends[i] - next.key_start;
        found.push_back(next);
        next = {query_ends[i], 0, key_ends[i], 0, next.first_share + heads * next.queries * next.keys};
    }
    return found;
}

AttentionOptions packed_options(const Sequence& sequence, const Tensor& q, const Tensor& k, const Tensor& drop_mask,
                                const Tensor& mask, const Training& call) {
    Tensor factors;
    if (drop_mask.defined()) {
        const int64_t count = q.size(1) * sequence.queries * sequence.keys;
        const Tensor bits = unpack_bits(drop_mask, {sequence.first_share + count}).narrow(0, sequence.first_share, count);
        factors = bits.view({1, q.size(1), sequence.queries, sequence.keys}).to(at::kFloat).div_(call.keep);
    }
    return options_of(q, k, {}, mask, factors, call);
}

void refuse_packed_bias(const Tensor& bias) {
    TORCH_CHECK(!bias.defined(), "a bias of packed sequences is not emulated");
}

void packed_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias, const Tensor& drop_mask,
                      const Tensor& mask, const Ints& query_ends, const Ints& key_ends, const Training& call,
                      bool statistics_as_input, const Tensor& maximum, const Tensor& sum, const Tensor& out) {
    refuse_packed_bias(bias);
    for (const Sequence& each : sequences(query_ends, key_ends, query.size(1))) {
        const Tensor q = from_tnd(each.of_queries(query)), k = from_tnd(each.of_keys(key)), v = from_tnd(each.of_keys(value));
        const Attended attended = attend(q, k, v, packed_options(each, q, k, drop_mask, mask, call));
        put(each.of_queries(out), to_tnd(attended.out));
        each.put_statistics(maximum, attended.maximum, statistics_as_input);
        each.put_statistics(sum, attended.sum, statistics_as_input);
    }
}

void packed_attention_backward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad,
                               const Tensor& bias, const Tensor& drop_mask, const Tensor& mask, const Ints& query_ends,
                               const Ints& key_ends, const Training& call, bool statistics_as_input, const Kept& kept,
                               const Wanted& wanted) {
    refuse_packed_bias(bias);
    for (const Sequence& each : sequences(query_ends, key_ends, query.size(1))) {
        const Tensor q = from_tnd(each.of_queries(query)), k = from_tnd(each.of_keys(key)), v = from_tnd(each.of_keys(value));
        const Attended attended{from_tnd(each.of_queries(kept.out)),
                                statistics(each.statistics(kept.maximum, statistics_as_input)),
                                statistics(each.statistics(kept.sum, statistics_as_input))};
        const AttentionGradients gradients = attend_backward(q, k, v, from_tnd(each.of_queries(grad)), attended,
                                                             packed_options(each, q, k, drop_mask, mask, call));
        put(each.of_queries(wanted.query), to_tnd(gradients.query));
        put(each.of_keys(wanted.key), to_tnd(gradients.key));
        put(each.of_keys(wanted.value), to_tnd(gradients.value));
    }
}

}  // namespace
}  // namespace cann

#define FLASH_TENSORS \
    Tensor query, Tensor key, Tensor value, Tensor realShift, Tensor dropMask, Tensor paddingMask, Tensor attenMask
#define FLASH_NUMBERS                                                                                           \
    double scaleValue, double keepProb, int64_t preTokens, int64_t nextTokens, int64_t headNum, std::string inputLayout, \
        int64_t innerPrecise, int64_t sparseMode
#define FLASH_RESULTS OutTensor softmaxMax, OutTensor softmaxSum, OutTensor softmaxOut, OutTensor attentionOut
#define FLASH_CALL(BIAS_TYPE) \
    Training{scaleValue, keepProb, preTokens, nextTokens, headNum, inputLayout, innerPrecise, sparseMode, BIAS_TYPE}
#define FLASH(BIAS_TYPE)                                                                                         \
    training_attention(query, key, value, realShift, dropMask, attenMask, FLASH_CALL(BIAS_TYPE), softmaxMax,     \
                       softmaxSum, attentionOut)
#define PACKED(BIAS_TYPE, STATISTICS_AS_INPUT)                                                                   \
    packed_attention(query, key, value, realShift, dropMask, attenMask, actualSeqQLen, actualSeqKvLen,           \
                     FLASH_CALL(BIAS_TYPE), STATISTICS_AS_INPUT, softmaxMax, softmaxSum, attentionOut)
#define SPARSE MaybeInts prefix
#define LENGTHS Ints actualSeqQLen, Ints actualSeqKvLen
#define STARTS MaybeInts qStartIdx, MaybeInts kvStartIdx
ACLNN(FlashAttentionScore, (FLASH_TENSORS, SPARSE, FLASH_NUMBERS, FLASH_RESULTS) { FLASH(1); })
ACLNN(FlashAttentionScoreV2, (FLASH_TENSORS, SPARSE, STARTS, FLASH_NUMBERS, int64_t pseType, FLASH_RESULTS) { FLASH(pseType); })
ACLNN(FlashAttentionVarLenScore, (FLASH_TENSORS, SPARSE, LENGTHS, FLASH_NUMBERS, FLASH_RESULTS) { PACKED(1, false); })
ACLNN(FlashAttentionVarLenScoreV2, (FLASH_TENSORS, SPARSE, LENGTHS, STARTS, FLASH_NUMBERS, int64_t pseType, FLASH_RESULTS) {
    PACKED(pseType, false);
})
ACLNN(FlashAttentionVarLenScoreV4, (FLASH_TENSORS, SPARSE, LENGTHS, FLASH_NUMBERS, std::string softmaxOutLayout, FLASH_RESULTS) {
    PACKED(1, softmaxOutLayout == "same_as_input");
})

// The names of the forward pass, which the rules of the profiles know.
#define GRAD_TENSORS                                                                                              \
    Tensor query, Tensor key, Tensor value, Tensor dy, Tensor realShift, Tensor dropMask, Tensor paddingMask,     \
        Tensor attenMask, Tensor softmaxMax, Tensor softmaxSum, Tensor softmaxIn, Tensor attentionIn
#define GRAD_RESULTS OutTensor dq, OutTensor dk, OutTensor dv, OutTensor dpse
#define GRAD_KEPT {softmaxMax, softmaxSum, attentionIn}, {dq, dk, dv, dpse}
#define FLASH_GRAD(BIAS_TYPE)                                                                                     \
    training_attention_backward(query, key, value, dy, realShift, dropMask, attenMask, FLASH_CALL(BIAS_TYPE), GRAD_KEPT)
#define PACKED_GRAD(BIAS_TYPE, STATISTICS_AS_INPUT)                                                               \
    packed_attention_backward(query, key, value, dy, realShift, dropMask, attenMask, actualSeqQLen, actualSeqKvLen, \
                              FLASH_CALL(BIAS_TYPE), STATISTICS_AS_INPUT, GRAD_KEPT)
ACLNN(FlashAttentionScoreGrad, (GRAD_TENSORS, SPARSE, FLASH_NUMBERS, GRAD_RESULTS) { FLASH_GRAD(1); })
ACLNN(FlashAttentionScoreGradV2, (GRAD_TENSORS, SPARSE, STARTS, FLASH_NUMBERS, int64_t pseType, GRAD_RESULTS) {
    FLASH_GRAD(pseType);
})
ACLNN(FlashAttentionUnpaddingScoreGrad, (GRAD_TENSORS, SPARSE, LENGTHS, FLASH_NUMBERS, GRAD_RESULTS) { PACKED_GRAD(1, false); })
ACLNN(FlashAttentionUnpaddingScoreGradV2, (GRAD_TENSORS, SPARSE, LENGTHS, STARTS, FLASH_NUMBERS, int64_t pseType, GRAD_RESULTS) {
    PACKED_GRAD(pseType, false);
})
ACLNN(FlashAttentionUnpaddingScoreGradV4, (GRAD_TENSORS, SPARSE, LENGTHS, FLASH_NUMBERS, GRAD_RESULTS, std::string softmaxInLayout) {
    PACKED_GRAD(1, softmaxInLayout == "same_as_input");
})
