// Kernels that calls through aclnn and nodes of compiled graphs have in common.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

namespace cann {

// ---- attention ----
struct Inference {
    int64_t heads;
    double scale;
    int64_t pre, next;
    std::string layout;
    int64_t key_heads, sparse_mode, inner_precise;
    std::vector<int64_t> query_lengths, key_lengths;  // empty: all
};

// float32 in the layout of the call, and the log of the sums, [batch, heads, queries, 1].
std::pair<at::Tensor, at::Tensor> infer_attention(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value, const at::Tensor& bias,
                                                  const at::Tensor& mask, const Inference& call);
struct Training {
    double scale, keep;
    int64_t pre, next, heads;
    std::string layout;
    int64_t inner_precise, sparse_mode;
    int64_t bias_type;  // 1: added before the scale, 0: after it
};
// Writes the result, and the statistics that the backward pass reads.
void training_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& bias,
                        const at::Tensor& drop_mask, const at::Tensor& mask, const Training& call,
                        const at::Tensor& maximum, const at::Tensor& sum, const at::Tensor& out);
// For what the operators take and the emulator does not: quantisation, paging, shared prefixes, separate rotary parts.
void refuse_any(const std::vector<at::Tensor>& tensors);

// ---- matrices ----
// x @ ((weight + offset) * scale) + bias, with a weight of int8 [K, N]; scale and offset as the profiles' rules want
// them, or [groups, N] with groups of `group_size` rows. Offset and bias may be undefined.
at::Tensor weight_quant_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                                const at::Tensor& offset, const at::Tensor& bias, int64_t group_size);

// ---- mixtures of experts ----
struct GroupedProducts {
    int64_t split_item, group_type, list_type, activation;
};
// x_i @ weight_i + bias_i, for groups of rows (group_type 0), of columns (2), or tensors one by one (-1). The weights
// are one tensor of [groups, K, N] or several of [K, N]; split_item of 2 and more makes one result.
std::vector<at::Tensor> grouped_products(const std::vector<at::Tensor>& x, const std::vector<at::Tensor>& weight,
                                         const std::vector<at::Tensor>& bias, const at::Tensor& group_list,
                                         const GroupedProducts& call);
struct TopExperts {
    at::Tensor shares, experts, rows, all;  // float32, int32, int32, and the float32 shares of all experts
};
TopExperts top_experts(const at::Tensor& logits, const at::Tensor& finished, int64_t choices, bool renormalise);
struct Routed {
    at::Tensor rows;    // of x, in the order of their experts: as many as are used
    at::Tensor places;  // the row of each choice, -1 of those without one
    at::Tensor order;   // the choice of each row; of the first edition its expert
    at::Tensor counts;  // rows of each expert
};
// Of experts [tokens, choices], those from first to last.
Routed routed(const at::Tensor& x, const at::Tensor& experts, int64_t first, int64_t last, int64_t active);
// The first edition, with the numbers of the rows given and returned.
Routed routed_by_rows(const at::Tensor& x, const at::Tensor& row_indices, const at::Tensor& experts, int64_t active);
at::Tensor finalized(const at::Tensor& rows, const at::Tensor& places, const at::Tensor& skip1, const at::Tensor& skip2,
                     const at::Tensor& bias, const at::Tensor& shares, const at::Tensor& experts, int64_t mode,
                     int64_t tokens);

// ---- layers; the results are float32 ----
struct GroupNormResult {
    at::Tensor y, mean, rstd;
};
GroupNormResult group_norm(const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& beta, int64_t groups,
                           double eps);
// y and 1 / rms over the trailing dimensions that gamma has.
std::pair<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& gamma, double epsilon);
enum RotaryMode { kHalf = 0, kInterleave = 1 };
at::Tensor fast_gelu_backward(const at::Tensor& grad, const at::Tensor& x);  // float32 in and out
// A quarter turn of the pairs that a position embedding turns. It is its own inverse but for the sign, as is its
// transpose.
at::Tensor rotate(const at::Tensor& x, int64_t mode);
at::Tensor rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t mode);
struct RotaryGradients {
    at::Tensor x, cos, sin;
};
// Those of cos and sin are undefined without x.
RotaryGradients rotary_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& cos,
                                const at::Tensor& sin, int64_t mode);
// The two halves of a dimension.
std::pair<at::Tensor, at::Tensor> halves(const at::Tensor& x, int64_t dim);

// ---- random numbers: float32 in [0, 1), and standard normal ----
at::Tensor uniform(at::IntArrayRef shape, uint64_t seed, uint64_t offset);
at::Tensor normal(at::IntArrayRef shape, uint64_t seed, uint64_t offset);
// A bit for each element, 1 to keep it, in whole groups of 128 bits; and what becomes of a tensor by them.
at::Tensor dropout_mask(int64_t bytes, double keep, uint64_t seed, uint64_t offset);
at::Tensor drop_out(const at::Tensor& x, const at::Tensor& mask, double keep);

}  // namespace cann
