// The products of matrices take their operands transposed by an attribute, so that a Transpose before them is not run.
// GE does the same; without it no weight of a linear layer could keep a private format.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "graph/compiler.h"

namespace cann::graph {
namespace {

// The attributes that transpose the first and the second operand; nullptr for other operators.
const char* const* transposing_attributes(const std::string& type) {
    static const char* const of_matrices[]{"transpose_x1", "transpose_x2"};
    static const char* const of_batches[]{"adj_x1", "adj_x2"};
    static const char* const of_weights[]{"transpose_x", "transpose_weight"};
    if (type == "WeightQuantBatchMatmulV2" || type == "GroupedMatmul") return of_weights;
    if (type == "MatMul" || type == "MatMulV2" || type == "MatMulV3") return of_matrices;
    if (type == "BatchMatMul" || type == "BatchMatMulV2" || type == "BatchMatMulV3") return of_batches;
    return nullptr;
}

bool swaps_last_two(const Compiled& compiled, const Step& step) {
    if (step.node->type != "Transpose") return false;
    const Tensor& known = compiled.values[step.inputs[1]].known;
    if (!known.defined() || known.numel() < 2) return false;
    const Tensor order = known.to(at::kLong);
    const int64_t rank = order.numel();
    Tensor swapped = at::arange(rank);
    swapped[rank - 1] = rank - 2;
    swapped[rank - 2] = rank - 1;
    return at::equal(order, swapped);
}

bool flag(const Attributes& attributes, const char* name) {
    const auto found = attributes.find(name);
    return found != attributes.end() && std::get<int64_t>(found->second) != 0;
}

void drop_unneeded(Compiled& compiled) {
    std::unordered_set<int> needed;
    for (int output : compiled.outputs) needed.insert(compiled.values[output].memory);
    std::vector<Step> kept;
    for (auto step = compiled.steps.rbegin(); step != compiled.steps.rend(); ++step) {
        const bool assigns = step->operation->kind == Kind::kAssigns;
        const bool used = std::any_of(step->outputs.begin(), step->outputs.end(),
                                      [&](int output) { return needed.count(compiled.values[output].memory) != 0; });
        if (!assigns && !used) {
            ++compiled.statistics.fused;
            continue;
        }
        for (int input : step->inputs) {
            if (input >= 0) needed.insert(compiled.values[input].memory);
        }
        kept.push_back(std::move(*step));
    }
    std::reverse(kept.begin(), kept.end());
    compiled.steps = std::move(kept);
}

}  // namespace

void fuse_transposes(Compiled& compiled) {
    std::unordered_map<int, int> sources;  // of transposed values
    for (Step& step : compiled.steps) {
        if (swaps_last_two(compiled, step)) sources[step.outputs[0]] = step.inputs[0];
        const char* const* attributes = transposing_attributes(step.node->type);
        if (attributes == nullptr) continue;
        for (int operand = 0; operand < 2; ++operand) {
            const auto source = sources.find(step.inputs[operand]);
            if (source == sources.end()) continue;
            auto changed = std::make_unique<Node>(*step.node);
            changed->attributes[attributes[operand]] = int64_t{!flag(step.node->attributes, attributes[operand])};
            step.inputs[operand] = source->second;
            step.node = changed.get();
            compiled.changed.push_back(std::move(changed));
        }
    }
    drop_unneeded(compiled);
}

}  // namespace cann::graph
