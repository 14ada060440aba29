// Mixtures of experts: which experts a token goes to, its rows in their order, products of groups of rows, and the way
// back. The operators' pages and tilings are in ops-transformer, folders moe/ and gmm/; the order of a sort is stable.
#include "ops/operator.h"
#include "ops/shared.h"

namespace cann {
namespace {

// Where each group of `length` rows or columns ends.
Ints ends_of(const Tensor& list, int64_t list_type, int64_t length) {
    TORCH_CHECK(list.defined(), "a group_list is needed");
    TORCH_CHECK(list_type == 0 || list_type == 1, "a group_list of type ", list_type, " is not emulated");
    const Tensor whole = list.to(at::kLong).contiguous();
    const Tensor ends = list_type == 0 ? whole : whole.cumsum(0);
    const Ints result(ends.data_ptr<int64_t>(), ends.data_ptr<int64_t>() + ends.numel());
    TORCH_CHECK(std::is_sorted(result.begin(), result.end()) && (result.empty() || result.front() >= 0),
                "group_list holds ", to_text(result), ", which does not ascend");
    TORCH_CHECK(result.empty() || result.back() == length, "group_list ends at ", result.back(), " of ", length);
    return result;
}

Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    const Tensor left = cube(x, 0), right = cube(weight, 0);
    // One rounding: a product in 16 bits would be rounded before the addition.
    return bias.defined() ? at::matmul(up(left), up(right)) + up(bias) : at::matmul(left, right);
}

// Tensors, or the rows of one that holds all.
Tensor one_of(const Tensors& several, int64_t group, int64_t rank_of_one) {
    if (several.empty()) return {};
    return several.size() == 1 && several[0].dim() > rank_of_one ? several[0].select(0, group) : several.at(group);
}

Tensor row(const Tensor& table, const Tensor& indices) { return table.index_select(0, indices.flatten().to(at::kLong)); }

Tensor rows_of_choices(int64_t rows, int64_t choices) {  // numbered down the columns
    return at::arange(rows * choices, at::kInt).view({choices, rows}).t();
}

}  // namespace

Tensors grouped_products(const Tensors& x, const Tensors& weight, const Tensors& bias, const Tensor& group_list,
                         const GroupedProducts& call) {
    TORCH_CHECK(call.activation == 0, "an activation of grouped products is of quantised ones, which are not emulated");
    const bool one_result = call.split_item >= 2;
    const int64_t groups = weight[0].dim() == 3 ? weight[0].size(0) : static_cast<int64_t>(weight.size());
    Tensors results;
    if (call.group_type == 2) {
        int64_t start = 0;
        for (const int64_t end : ends_of(group_list, call.list_type, x[0].size(1))) {
            const Tensor part = weight[0].narrow(0, start, end - start);
            results.push_back(product(x[0].narrow(1, start, end - start), part, {}));
            start = end;
        }
        return one_result ? Tensors{at::stack(results)} : results;
    }
    Tensors rows = x;
    if (call.group_type == 0 && x.size() == 1) {
        rows.clear();
        int64_t start = 0;
        for (const int64_t end : ends_of(group_list, call.list_type, x[0].size(0))) {
            rows.push_back(x[0].narrow(0, start, end - start));
            start = end;
        }
    }
    TORCH_CHECK(static_cast<int64_t>(rows.size()) == groups, rows.size(), " groups for ", groups, " weights");
    for (int64_t group = 0; group < groups; ++group) {
        results.push_back(product(rows[group], one_of(weight, group, 2), one_of(bias, group, 1)));
    }
    return one_result ? Tensors{at::cat(results)} : results;
}

TopExperts top_experts(const Tensor& logits, const Tensor& finished, int64_t choices, bool renormalise) {
    const int64_t experts = logits.size(-1), rows = logits.numel() / std::max<int64_t>(experts, 1);
    const Tensor shares = at::softmax(up(logits), -1);
    const auto [sorted, order] = at::sort(shares, /*stable=*/true, -1, /*descending=*/true);
    Tensor best = sorted.narrow(-1, 0, choices), indices = order.narrow(-1, 0, choices);
    if (renormalise) best = best / best.sum(-1, true);
    if (finished.defined()) indices = at::where(finished.unsqueeze(-1).to(at::kBool), experts, indices);
    return {best, indices.to(at::kInt), rows_of_choices(rows, choices).reshape(indices.sizes()), shares};
}

Routed routed(const Tensor& x, const Tensor& experts, int64_t first, int64_t last, int64_t active) {
    const Tensor flat = experts.flatten().to(at::kLong);
    const Tensor here = (flat >= first).logical_and(flat < last);
    const Tensor order = at::argsort(at::where(here, flat, std::numeric_limits<int64_t>::max()), /*stable=*/true);
    const int64_t used = here.sum().item<int64_t>();
    const Tensor front = order.narrow(0, 0, used);
    const Tensor places = at::full_like(flat, -1).index_copy(0, front, at::arange(used));
    const Tensor counts = at::bincount(flat.masked_select(here) - first, {}, last - first);
    const Tensor sources = order.narrow(0, 0, active > 0 ? std::min(active, used) : used);
    return {row(x, sources.floor_divide(experts.size(1))), places.to(at::kInt), order.to(at::kInt), counts};
}

void put_rows(const Tensor& out, const Tensor& rows) {
    if (rows.size(0) > 0) move(out.narrow(0, 0, rows.size(0)), rows);  // what lies behind them is not written
}

Routed routed_by_rows(const Tensor& x, const Tensor& row_indices, const Tensor& experts, int64_t active) {
    const int64_t rows = x.size(0), choices = experts.size(1);
    const auto [sorted, order] = at::sort(experts.flatten(), /*stable=*/true, 0, /*descending=*/false);
    const Tensor sources = row(row_indices.flatten(), order).to(at::kLong);
    const Tensor places = at::empty_like(sources).index_copy(0, sources, at::arange(sources.numel()));
    const Tensor used = sources.narrow(0, 0, std::min(active, rows) * choices).remainder(rows);
    return {row(x, used), places.to(at::kInt), sorted.to(at::kInt), {}};
}

Tensor unpermuted(const Tensor& rows, const Tensor& places, const Tensor& shares) {
    if (!shares.defined()) return row(rows, places);
    const Tensor chosen = row(up(rows), places).view({shares.size(0), shares.size(1), rows.size(-1)});
    return (chosen * up(shares).unsqueeze(-1)).sum(1);
}

Tensor finalized(const Tensor& rows, const Tensor& places, const Tensor& skip1, const Tensor& skip2, const Tensor& bias,
                 const Tensor& shares, const Tensor& experts, int64_t mode, int64_t tokens) {
    TORCH_CHECK(mode >= 0 && mode <= 3, "drop_pad_mode ", mode, " is none of 0 to 3");
    const int64_t choices = places.numel() / std::max<int64_t>(tokens, 1);
    const Tensor by_token = mode < 2 ? places.view({choices, tokens}).t() : places.view({tokens, choices});
    const Tensor flat = up(rows).flatten(0, -2), kept = (by_token >= 0).unsqueeze(-1);
    Tensor chosen = row(flat, by_token.clamp_min(0)).view({tokens, choices, flat.size(-1)}) * kept;
    if (bias.defined()) chosen = chosen + row(up(bias), experts).view(chosen.sizes());
    if (shares.defined()) chosen = chosen * up(shares).unsqueeze(-1);
    Tensor sum = chosen.sum(1);
    for (const Tensor& skip : {skip1, skip2}) {
        if (skip.defined()) sum = sum + up(skip);
    }
    return sum;
}

}  // namespace cann

#define GROUPED_TENSORS                                                                                            \
    Tensors x, Tensors weight, Tensors bias, Tensors scale, Tensors offset, Tensors antiquantScale,                \
        Tensors antiquantOffset, Tensors perTokenScale, Tensor groupList, Tensors activationInput,                 \
        Tensors activationQuantScale, Tensors activationQuantOffset, int64_t splitItem, int64_t groupType,         \
        int64_t groupListType, int64_t actType
#define PUT_GROUPED_PRODUCTS                                                                                       \
    for (const auto& quantised : {scale, offset, antiquantScale, antiquantOffset, perTokenScale}) refuse_any(quantised); \
    const auto results = grouped_products(x, weight, bias, groupList, {splitItem, groupType, groupListType, actType}); \
    for (size_t i = 0; i < results.size(); ++i) put(out[i], results[i])

ACLNN(GroupedMatmulV4, (GROUPED_TENSORS, OutTensors out, Tensors activationFeatureOut, Tensors dynQuantScaleOut) {
    PUT_GROUPED_PRODUCTS;
})
ACLNN(GroupedMatmulV5, (GROUPED_TENSORS, MaybeInts tuningConfig, OutTensors out, Tensors activationFeatureOut,
                        Tensors dynQuantScaleOut) { PUT_GROUPED_PRODUCTS; })
ACLNN(GroupedMatmulWeightNz, (GROUPED_TENSORS, MaybeInts tuningConfig, int64_t quantGroupSize, OutTensors out,
                              Tensors activationFeatureOut, Tensors dynQuantScaleOut) { PUT_GROUPED_PRODUCTS; })

ACLNN(MoeGatingTopKSoftmax,
      (Tensor x, Tensor finished, int64_t k, OutTensor y, OutTensor expertIdx, OutTensor rowIdx) {
    const TopExperts top = top_experts(x, finished, k, false);
    put(y, top.shares);
    move(expertIdx, top.experts);
    move(rowIdx, top.rows);
})
ACLNN(MoeGatingTopKSoftmaxV2, (Tensor x, Tensor finished, int64_t k, int64_t renorm, bool outputSoftmax, OutTensor y,
                               OutTensor expertIdx, OutTensor softmax) {
    const TopExperts top = top_experts(x, finished, k, renorm == 1);
    put(y, top.shares);
    move(expertIdx, top.experts);
    if (outputSoftmax) put(softmax, top.all);
})

ACLNN(MoeInitRouting, (Tensor x, Tensor rowIdx, Tensor expertIdx, int64_t activeNum, OutTensor expandedX,
                       OutTensor expandedRowIdx, OutTensor expandedExpertIdx) {
    const Routed to = routed_by_rows(x, rowIdx, expertIdx, activeNum);
    put_rows(expandedX, to.rows);
    move(expandedRowIdx, to.places);
    move(expandedExpertIdx, to.order);
})
ACLNN(MoeInitRoutingV2, (Tensor x, Tensor expertIdx, int64_t activeNum, int64_t expertCapacity, int64_t expertNum,
                         int64_t dropPadMode, int64_t tokensFlag, bool beforeCapacityFlag, OutTensor expandedX,
                         OutTensor expandedRowIdx, OutTensor expertTokens, OutTensor beforeCapacity) {
    TORCH_CHECK(dropPadMode == 0, "drop_pad_mode ", dropPadMode, " is not emulated");
    const Routed to = routed(x, expertIdx, 0, expertNum, activeNum);
    put_rows(expandedX, to.rows);
    move(expandedRowIdx, to.places);
    if (tokensFlag != 0) move(expertTokens, tokensFlag == 1 ? to.counts.cumsum(0) : to.counts);
})
ACLNN(MoeInitRoutingV3, (Tensor x, Tensor expertIdx, Tensor scale, Tensor offset, int64_t activeNum,
                         int64_t expertCapacity, int64_t expertNum, int64_t dropPadMode, int64_t tokensType,
                         bool tokensFlag, int64_t quantMode, Ints range, int64_t rowIdxType, OutTensor expandedX,
                         OutTensor expandedRowIdx, OutTensor expertTokens, OutTensor expandedScale) {
    TORCH_CHECK(quantMode == -1 && dropPadMode == 0, "quantised and padded routing is not emulated");
    const Ints experts = range.empty() ? Ints{0, expertNum} : range;
    const Routed to = routed(x, expertIdx, experts.at(0), experts.at(1), activeNum);
    put_rows(expandedX, to.rows);
    move(expandedRowIdx, rowIdxType == 1 ? to.order : to.places);
    if (tokensFlag) {
        TORCH_CHECK(tokensType == 0 || tokensType == 1, "expert_tokens_num_type ", tokensType, " is not emulated");
        move(expertTokens, tokensType == 0 ? to.counts.cumsum(0) : to.counts);
    }
    if (scale.defined()) put_rows(expandedScale, row(scale, to.order.floor_divide(expertIdx.size(1))));
})

ACLNN(MoeTokenPermute, (Tensor tokens, Tensor indices, int64_t numOutTokens, bool paddedMode, OutTensor permuted,
                        OutTensor sortedIndices) {
    TORCH_CHECK(!paddedMode, "padded_mode is not emulated");
    const Tensor experts = indices.dim() == 1 ? indices.unsqueeze(1) : indices;
    const int64_t count = experts.numel() == 0 ? 0 : experts.max().item<int64_t>() + 1;
    const Routed to = routed(tokens, experts, 0, count, numOutTokens);
    put_rows(permuted, to.rows.narrow(0, 0, permuted.size(0)));
    move(sortedIndices, to.places);
})
ACLNN(MoeTokenUnpermute, (Tensor permutedTokens, Tensor sortedIndices, Tensor probs, bool paddedMode, Ints restoreShape,
                          OutTensor out) {
    TORCH_CHECK(!paddedMode, "padded_mode is not emulated");
    put(out, unpermuted(permutedTokens, sortedIndices, probs));
})

ACLNN(MoeFinalizeRouting, (Tensor expandedX, Tensor skip1, Tensor skip2, Tensor bias, Tensor scales,
                           Tensor expandedRowIdx, Tensor expertIdx, OutTensor out) {
    put(out, finalized(expandedX, expandedRowIdx, skip1, skip2, bias, scales, expertIdx, 0, out.size(0)));
})
ACLNN(MoeFinalizeRoutingV2, (Tensor expandedX, Tensor expandedRowIdx, Tensor skip1, Tensor skip2, Tensor bias,
                             Tensor scales, Tensor expertIdx, int64_t dropPadMode, OutTensor out) {
    put(out, finalized(expandedX, expandedRowIdx, skip1, skip2, bias, scales, expertIdx, dropPadMode, out.size(0)));
})
