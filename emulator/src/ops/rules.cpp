// Which calls a chip refuses. The rules are data (emulator/profiles); `python -m emulator` hands them over as a file
// with a rule a line and tabs between its fields: operator, parameter, check, value of the check, text of the error.
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "ops/operator.h"

namespace cann {
namespace {

constexpr int kInvalidParameter = 161002;

struct Rule {
    std::string parameter, check, value, text;
};

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> fields;
    std::istringstream stream(text);
    for (std::string field; std::getline(stream, field, separator);) fields.push_back(field);
    return fields;
}

struct Rules {
    std::set<std::string> dtypes;               // that the chip has at all
    std::multimap<std::string, Rule> operators;

    Rules() {
        const char* path = std::getenv("CANN_EMULATOR_RULES");
        std::ifstream file(path ? path : "");
        if (!file) die("CANN_EMULATOR_RULES=%s cannot be read", path ? path : "");
        for (std::string line; std::getline(file, line);) {
            const auto fields = split(line, '\t');
            if (fields.size() != 5) die("%s: not a rule: %s", path, line.c_str());
            if (fields[0] == "*") {
                dtypes.insert(fields[3]);
            } else {
                operators.emplace(fields[0], Rule{fields[1], fields[2], fields[3], fields[4]});
            }
        }
    }
};

const Rules& rules() {
    static const Rules instance;
    return instance;
}

bool contains(const std::string& list, const std::string& item) {
    const auto items = split(list, ',');
    return std::find(items.begin(), items.end(), item) != items.end();
}

// Sequence length and head size of an attention operand in the call's layout.
int64_t length_of(const Call& call, const char* name) {
    const TensorArgument* tensor = call.tensor(name);
    const std::string layout = call.find("inputLayout")->value;
    return tensor->sizes[layout.rfind("BN", 0) == 0 ? 2 : layout == "SBH" || layout[0] == 'T' ? 0 : 1];
}

int64_t head_dim_of(const Call& call, const char* name) {
    const TensorArgument* tensor = call.tensor(name);
    const std::string layout = call.find("inputLayout")->value;
    const int64_t width = tensor->sizes.back();
    const int64_t heads = std::max<int64_t>(call.number(call.find("numHeads") ? "numHeads" : "headNum", 1), 1);
    return layout == "BSH" || layout == "SBH" ? width / heads : width;
}

ScalarType dtype_of(const Call& call, const char* name) {
    const TensorArgument* tensor = call.tensor(name);
    return tensor == nullptr ? ScalarType::Undefined : tensor->dtype;
}

// Whether the tensor lies in memory as it is or with its last two dimensions swapped, without gaps.
bool is_dense_or_transposed(const TensorArgument& tensor) {
    auto sizes = tensor.sizes, strides = tensor.strides;
    const size_t rank = sizes.size();
    for (const bool swap : {false, true}) {
        if (swap && rank >= 2) {
            std::swap(sizes[rank - 1], sizes[rank - 2]);
            std::swap(strides[rank - 1], strides[rank - 2]);
        }
        int64_t dense = 1;
        bool holds = true;
        for (size_t i = rank; i-- > 0; dense *= sizes[i]) holds &= sizes[i] == 1 || strides[i] == dense;
        if (holds) return true;
    }
    return false;
}

// Relations between parameters, by the names that the profiles use.
bool relation_holds(const Call& call, const std::string& name) {
    if (name == "mask_needs_equal_lengths_of_16") {
        const int64_t queries = length_of(call, "query"), keys = length_of(call, "key");
        return !call.tensor("attenMask") || (queries % 16 == 0 && queries == keys);
    }
    if (name == "pre_tokens_cover_queries") return call.number("preTokens", 0) >= length_of(call, "query");
    if (name == "next_tokens_zero_or_cover_keys") {
        const int64_t next = call.number("nextTokens", 0);
        return next == 0 || next >= length_of(call, "key");
    }
    if (name == "causal_masks_are_2048_square") {
        const int64_t sparse_mode = call.number("sparseMode", 0);
        const TensorArgument* mask = call.tensor("attenMask");
        if (mask == nullptr || sparse_mode < 2) return true;
        const auto& sizes = mask->sizes;
        return sizes.size() >= 2 && sizes[sizes.size() - 1] == 2048 && sizes[sizes.size() - 2] == 2048;
    }
    if (name == "groups_divide_channels") return call.tensor("self")->sizes[1] % call.number("group", 1) == 0;
    if (name == "scale_has_the_dtype_of_x") {  // a graph casts it
        const ScalarType scale = dtype_of(call, "antiquantScale");
        return call.graph != nullptr || scale == at::kLong || scale == dtype_of(call, "x");
    }
    if (name == "bias_is_float16_or_float32_for_bfloat16") {
        const ScalarType bias = dtype_of(call, "biasOptional");
        return bias == ScalarType::Undefined || bias == (dtype_of(call, "x") == at::kBFloat16 ? at::kFloat : at::kHalf);
    }
    if (name == "one_x_weight_and_result") {  // grouped products; a graph numbers its lists
        const auto alone = [&](const char* list) { return call.find(list)->tensors.size() == 1; };
        return alone("x") && alone("weight") && alone("out") && !call.find("x1") && !call.find("weight1");
    }
    if (name == "active_num_is_all_or_unset") {
        const int64_t active = call.number("activeNum", -1);
        return active == -1 || active == c10::multiply_integers(call.tensor("expertIdx")->sizes);
    }
    if (name == "active_num_is_not_negative") return call.number("activeNum", 0) >= 0;
    if (name == "private_weight_in_graphs_only") return call.graph != nullptr || !is_private(call.tensor("weight")->format);
    if (name == "matrices_dense_or_transposed") {
        return is_dense_or_transposed(*call.tensor("x")) && is_dense_or_transposed(*call.tensor("weight"));
    }
    if (name == "states_have_the_shape_of_the_parameter") {
        const auto fits = [&](const char* other) {
            const TensorArgument* tensor = call.tensor(other);
            return tensor == nullptr || tensor->sizes == call.tensor("var")->sizes;
        };
        return fits("m") && fits("v") && fits("grad") && fits("maxGradNorm");
    }
    die("the profile names the unknown relation %s", name.c_str());
}

bool tensor_holds(const Rule& rule, const TensorArgument& tensor, const Call& call) {
    if (rule.check == "dtypes") return contains(rule.value, dtype_name(tensor.dtype));
    if (rule.check == "not_empty") return tensor.bytes() != 0;
    const int64_t rank = static_cast<int64_t>(tensor.sizes.size());
    if (rank == 0) return true;
    const int64_t last_bytes = tensor.sizes.back() * static_cast<int64_t>(c10::elementSize(tensor.dtype));
    if (rule.check == "even_dim") {
        const int64_t dim = call.number("dim", -1);
        return tensor.sizes.at(dim < 0 ? dim + rank : dim) % 2 == 0;
    }
    const int64_t limit = std::stoll(rule.value);
    if (rule.check == "max_rank") return rank <= limit;
    if (rule.check == "last_two_dims_max") {
        return std::all_of(tensor.sizes.end() - std::min<int64_t>(rank, 2), tensor.sizes.end(),
                           [limit](int64_t size) { return size <= limit; });
    }
    if (rule.check == "last_dim_max") return tensor.sizes.back() <= limit;
    if (rule.check == "max_batch") return tensor.sizes[0] <= limit;
    if (rule.check == "last_dim_bytes_multiple") return last_bytes % limit == 0;
    if (rule.check == "last_dim_bytes_min") return last_bytes >= limit;
    if (rule.check == "last_two_dims_multiple") {
        return rank >= 2 && tensor.sizes[rank - 1] % limit == 0 && tensor.sizes[rank - 2] % limit == 0;
    }
    die("the profile names the unknown check %s", rule.check.c_str());
}

bool holds(const Rule& rule, const Call& call) {
    if (rule.check == "relation") return relation_holds(call, rule.value);
    if (rule.check == "unavailable") return false;
    if (rule.check == "max_head_dim") return head_dim_of(call, rule.parameter.c_str()) <= std::stoll(rule.value);
    if (rule.check == "max_length") return length_of(call, rule.parameter.c_str()) <= std::stoll(rule.value);
    if (rule.check == "head_dim_multiple") return head_dim_of(call, rule.parameter.c_str()) % std::stoll(rule.value) == 0;
    const Argument* argument = call.find(rule.parameter);
    if (argument == nullptr) die("%s has no parameter %s, but the profile has a rule for it", call.operator_name,
                                 rule.parameter.c_str());
    if (rule.check == "absent") return argument->tensors.empty() && argument->value.empty();
    if (rule.check == "values") return contains(rule.value, argument->value);
    if (rule.check == "values_except") return !contains(rule.value, argument->value);
    if (rule.check == "max") return std::stoll(argument->value) <= std::stoll(rule.value);
    for (const auto& tensor : argument->tensors) {
        if (!tensor_holds(rule, *tensor, call)) return false;
    }
    return true;
}

// The parameters through which the matrix operators take weights in private formats.
bool takes_private_format(const Argument& argument) {
    return argument.stored || contains("mat2,batch2,weight", argument.name);
}

}  // namespace

int refuse(const Call& call) {
    for (const Argument& argument : call.arguments) {
        for (const auto& tensor : argument.tensors) {
            if (rules().dtypes.count(dtype_name(tensor->dtype)) == 0) {
                return fail(kInvalidParameter, "%s: %s is %s, which %s does not have", call.title().c_str(),
                            argument.name.c_str(), dtype_name(tensor->dtype), chip().soc.c_str());
            }
            if (is_private(tensor->format) && !takes_private_format(argument)) {
                return fail(kInvalidParameter, "%s: %s has the format %s, which the operator does not take",
                            call.title().c_str(), argument.name.c_str(), format_name(tensor->format).c_str());
            }
        }
    }
    const auto broken = broken_rule(call);
    return broken ? fail(kInvalidParameter, "%s on %s: %s", call.title().c_str(), chip().soc.c_str(),
                         broken->text.c_str())
                  : 0;
}

std::optional<BrokenRule> broken_rule(const Call& call) {
    const auto [first, last] = rules().operators.equal_range(call.operator_name);
    for (auto rule = first; rule != last; ++rule) {
        if (!holds(rule->second, call)) return BrokenRule{rule->second.parameter, rule->second.text};
    }
    return std::nullopt;
}

}  // namespace cann
