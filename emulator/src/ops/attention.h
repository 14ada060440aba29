// Fused attention in the layout [batch, heads, length, head_dim]: what inference, training and its way back have in common.
#pragma once

#include <string>

#include "ops/operator.h"

namespace cann {

// Between [tokens, heads, head_dim] and [1, heads, tokens, head_dim], for one sequence.
inline Tensor from_tnd(const Tensor& x) { return x.transpose(0, 1).unsqueeze(0); }
inline Tensor to_tnd(const Tensor& x) { return x.squeeze(0).transpose(0, 1); }
// Between the layout of a call and [batch, heads, length, head_dim].
Tensor to_bnsd(const Tensor& x, const std::string& layout, int64_t heads);
Tensor from_bnsd(const Tensor& x, const std::string& layout);

enum SparseMode { kDefault = 0, kAllMask = 1, kLeftUpCausal = 2, kRightDownCausal = 3, kBand = 4 };

// Where a sparse mode by itself drops scores, [queries, keys]; undefined when nowhere.
Tensor dropped_by_mode(int64_t queries, int64_t keys, int64_t sparse_mode, int64_t pre, int64_t next);
// With those of the mask, broadcastable to [batch, heads, queries, keys]; undefined without a mask.
Tensor dropped(const Tensor& mask, int64_t queries, int64_t keys, int64_t sparse_mode, int64_t pre, int64_t next);

struct AttentionOptions {
    double scale;
    Tensor dropped;         // bool
    Tensor bias;            // added to the scaled scores
    bool zero_when_all_dropped = false;
    bool scores_in_float16 = false;
    Tensor dropout;         // what probabilities are multiplied with: 0, or 1 / keep_prob
};

struct Attended {
    Tensor out, maximum, sum;  // float32: [batch, heads, queries, head_dim] and twice [batch, heads, queries, 1]
};
Attended attend(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options);

// ---- its pieces: some rows, that is queries, at a time ----
int64_t rows_at_once(const Tensor& query, const Tensor& key);
// The part of a tensor of all queries, or the tensor where one row is for all.
Tensor rows_of(const Tensor& x, int64_t start, int64_t count, int64_t queries);
// Keys or values in float32, for each of the query's heads.
Tensor repeat_heads(const Tensor& x, int64_t heads);
// Scaled, with the dropped ones out of reach of the softmax; float32 in and out.
Tensor scores_of_rows(const Tensor& query, const Tensor& key, const AttentionOptions& options, int64_t start, int64_t count);

inline Tensor as_bias(const Tensor& bias) { return bias.defined() ? up(bias) : bias; }

}  // namespace cann
