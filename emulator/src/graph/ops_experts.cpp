// Mixtures of experts.
#include "graph/operation.h"
#include "ops/shared.h"

namespace cann::graph {
namespace {

// The tensors of a dynamic input. torchair stands an empty tensor in for those that it was not given.
std::vector<Tensor> list_of(const Operands& x, const std::string& name) {
    std::vector<Tensor> tensors;
    for (int index = 0;; ++index) {
        const Tensor tensor = x[name + std::to_string(index)];
        if (!tensor.defined()) return tensors;
        if (tensor.dim() != 1 || tensor.size(0) != 0) tensors.push_back(tensor);
    }
}

Results grouped(const Operands& x) {
    for (const char* name : {"scale", "offset", "antiquant_scale", "antiquant_offset"}) refuse_any(list_of(x, name));
    refuse_any({x["per_token_scale"]});
    x.list("tuning_config");
    x.integer("dtype", 0);  // of quantised products
    TORCH_CHECK(!x.flag("transpose_x"), "grouped products of a transposed x are not emulated");
    const std::vector<Tensor> rows = list_of(x, "x");
    std::vector<Tensor> weights = list_of(x, "weight");
    if (x.flag("transpose_weight")) {
        for (Tensor& weight : weights) weight = weight.transpose(-1, -2);
    }
    const GroupedProducts call{x.integer("split_item", 0), x.integer("group_type", -1), x.integer("group_list_type", 0),
                               x.integer("act_type", 0)};
    if (x.compiling()) {
        TORCH_CHECK(call.group_type == 0 && call.split_item >= 2 && rows.size() == 1,
                    "in graphs only products of groups of rows with one result are emulated");
        list_of(x, "bias");
        return {at::empty({rows[0].size(0), weights[0].size(-1)}, rows[0].options())};
    }
    Results results;
    for (Tensor& result : grouped_products(rows, weights, list_of(x, "bias"), x["group_list"], call)) {
        results.push_back(std::move(result));
    }
    return results;
}

Results top_experts(const Operands& x) {
    const int64_t choices = x.integer("k");
    const auto integers = x[0].options().dtype(at::kInt);
    if (x.compiling()) {
        Ints sizes = x[0].sizes().vec();
        sizes.back() = choices;
        return {at::empty(sizes, x[0].options()), as(at::kInt, at::empty(sizes, integers)),
                as(at::kInt, at::empty(sizes, integers))};
    }
    const TopExperts top = cann::top_experts(x[0], x[1], choices, false);
    return {top.shares, as(at::kInt, top.experts), as(at::kInt, top.rows)};
}

Results routed(const Operands& x) {
    TORCH_CHECK(x.integer("quant_mode", -1) == -1 && x.integer("drop_pad_mode", 0) == 0 && !x["scale"].defined(),
                "quantised and padded routing is not emulated");
    const int64_t type = x.integer("expert_tokens_num_type", 0), active = x.integer("active_num", -1);
    TORCH_CHECK(type == 0 || type == 1, "expert_tokens_num_type ", type, " is not emulated");
    const bool counts = x.flag("expert_tokens_num_flag"), by_rows = x.integer("row_idx_type", 0) == 1;
    x.integer("expert_capacity", -1);  // of padded routing
    const int64_t experts = x.integer("expert_num", -1);
    Ints range = x.list("active_expert_range");
    if (range.empty()) range = {0, experts};
    const int64_t tokens = x[0].size(0), choices = x[1].size(1);
    const int64_t rows = active > 0 ? std::min(active, tokens * choices) : tokens * choices;
    const auto options = x[0].options();
    Tensor expanded = at::zeros({rows, x[0].size(1)}, options), places = at::empty({tokens * choices}, x[1].options());
    Tensor ends = at::zeros({range.at(1) - range.at(0)}, options.dtype(at::kLong));
    if (!x.compiling()) {
        const Routed to = cann::routed(x[0], x[1], range[0], range[1], active);
        if (to.rows.size(0) > 0) move(expanded.narrow(0, 0, to.rows.size(0)), to.rows);
        places = by_rows ? to.order : to.places;
        if (counts) ends = type == 0 ? to.counts.cumsum(0) : to.counts;
    }
    const Tensor scales = at::empty({rows}, options.dtype(at::kFloat));
    return {expanded, as(at::kInt, places), as(at::kLong, ends), as(at::kFloat, scales)};
}

Results routed_by_rows(const Operands& x) {
    const int64_t tokens = x[0].size(0), choices = x[2].size(1), active = std::min(x.integer("active_num"), tokens);
    if (x.compiling()) {
        const Tensor indices = at::empty({tokens * choices}, x[2].options());
        return {at::empty({active * choices, x[0].size(1)}, x[0].options()), as(at::kInt, indices),
                as(at::kInt, indices)};
    }
    const Routed to = cann::routed_by_rows(x[0], x[1], x[2], active);
    return {to.rows, as(at::kInt, to.places), as(at::kInt, to.order)};
}

Tensor finalized(const Operands& x) {
    const Tensor rows = x["expanded_x"], places = x["expanded_row_idx"], scales = x["scales"];
    const Tensor experts = x["expert_idx"].defined() ? x["expert_idx"] : x["expanded_expert_idx"];
    const int64_t mode = x.integer("drop_pad_mode", 0), choices = x.integer("k", 1);
    const int64_t tokens = scales.defined() ? scales.size(0) : places.size(0) / choices;
    if (x.compiling()) return at::empty({tokens, rows.size(-1)}, rows.options());
    return cann::finalized(rows, places, x["x1"], x["x2"], x["bias"], scales, experts, mode, tokens);
}

}  // namespace
}  // namespace cann::graph

GE(GroupedMatmul, grouped(x))
GE(MoeGatingTopKSoftmax, top_experts(x))
GE_MOVES(MoeInitRouting, routed_by_rows(x))
GE_MOVES(MoeInitRoutingV3, routed(x))
GE(MoeFinalizeRouting, finalized(x))
GE(MoeFinalizeRoutingV2, finalized(x))
