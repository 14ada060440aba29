// Fused attention, and the merging of tokens.
#include "graph/operation.h"
#include "ops/shared.h"

namespace cann::graph {
namespace {

Inference call_of(const Operands& x, const char* scale, const char* pre, const char* next) {
    return {x.integer("num_heads"), x.real(scale, 1), x.integer(pre, INT32_MAX), x.integer(next, 0),
            x.text("input_layout", "BSH"), x.integer("num_key_value_heads", 0), x.integer("sparse_mode", 0),
            x.integer("inner_precise", 0), x.ints("actual_seq_lengths"), x.ints("actual_seq_lengths_kv")};
}

// [batch, heads, length, ...] of the query
Ints sizes_of_sums(const Tensor& query, const Inference& call) {
    if (call.layout == "BNSD") return {query.size(0), query.size(1), query.size(2), 1};
    if (call.layout == "BSND") return {query.size(0), query.size(2), query.size(1), 1};
    return {query.size(0), call.heads, query.size(1), 1};
}

Tensor bias_of(const Operands& x) { return x["pse_shift"].defined() ? up(x["pse_shift"]) : Tensor(); }

Tensor prompt_attention(const Operands& x) {
    refuse_any({x["deq_scale1"], x["quant_scale1"], x["deq_scale2"], x["quant_scale2"], x["quant_offset2"]});
    const Inference call = call_of(x, "scale_value", "pre_tokens", "next_tokens");
    if (x.compiling()) return at::empty_like(x[0]);
    return infer_attention(x[0], x[1], x[2], bias_of(x), x["atten_mask"], call).first;
}

Results fused_attention(const Operands& x) {
    for (const char* name :
         {"dequant_scale1", "quant_scale1", "dequant_scale2", "quant_scale2", "quant_offset2", "antiquant_scale",
          "antiquant_offset", "block_table", "query_padding_size", "kv_padding_size", "key_antiquant_scale",
          "key_antiquant_offset", "value_antiquant_scale", "value_antiquant_offset", "key_shared_prefix",
          "value_shared_prefix", "query_rope", "key_rope", "key_rope_antiquant_scale", "dequant_scale_query",
          "learnable_sink"}) {
        refuse_any({x[name]});
    }
    for (const char* name : {"block_size", "antiquant_mode", "key_antiquant_mode", "value_antiquant_mode",
                             "query_quant_mode", "pse_type", "out_dtype"}) {
        TORCH_CHECK(x.integer(name, 0) == 0, "the attribute ", name, " is not emulated");
    }
    const Inference call = call_of(x, "scale", "pre_tokens", "next_tokens");
    const bool with_sums = x.flag("softmax_lse_flag");
    if (x.compiling()) {
        const Ints sizes = with_sums ? sizes_of_sums(x[0], call) : Ints{0};
        return {at::empty_like(x[0]), as(at::kFloat, at::empty(sizes, x[0].options().dtype(at::kFloat)))};
    }
    const auto [out, sums] = infer_attention(x[0], x["key0"], x["value0"], bias_of(x), x["atten_mask"], call);
    return {out, as(at::kFloat, with_sums ? sums : at::empty({0}))};
}

Ints batch_heads_queries(const Tensor& query, const std::string& layout, int64_t heads) {
    if (layout == "BNSD") return {query.size(0), query.size(1), query.size(2), 8};
    if (layout == "BSND") return {query.size(0), query.size(2), query.size(1), 8};
    TORCH_CHECK(layout == "BSH", "layout ", layout, " is not emulated in graphs");
    return {query.size(0), heads, query.size(1), 8};
}

Results flash_attention(const Operands& x) {
    refuse_any({x["padding_mask"], x["prefix"], x["actual_seq_qlen"], x["actual_seq_kvlen"]});
    const Training call{x.real("scale_value", 1), x.real("keep_prob", 1), x.integer("pre_tockens", INT32_MAX),
                        x.integer("next_tockens", INT32_MAX), x.integer("head_num"), x.text("input_layout", "BSH"),
                        x.integer("inner_precise", 1), x.integer("sparse_mode", 0), 1};
    const auto options = at::device(x[0].device()).dtype(at::kFloat);
    const Tensor maximum = at::empty(batch_heads_queries(x[0], call.layout, call.heads), options), sum = at::empty_like(maximum);
    const Tensor out = at::empty(x[0].sizes(), options);
    if (!x.compiling()) {
        training_attention(x[0], x[1], x[2], x["real_shift"], x["drop_mask"], x["atten_mask"], call, maximum, sum, out);
    }
    return {as(at::kFloat, maximum), as(at::kFloat, sum), at::empty({0}, options), out};
}

}  // namespace
}  // namespace cann::graph

GE(PromptFlashAttention, prompt_attention(x))
GE(FusedInferAttentionScore, fused_attention(x))
GE(FlashAttentionScore, flash_attention(x))
