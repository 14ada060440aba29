// Where GE changes formats: its convolutions read and write feature maps as NC1HWC0 and read weights as FRACTAL_Z,
// operators that go element by element pass NC1HWC0 on, and all others want plain tensors. A conversion is a TransData,
// which costs a launch and its traffic; the emulator's feature maps stay plain, so that it is a copy here.
#include <map>
#include <unordered_set>

#include "graph/compiler.h"

namespace cann::graph {
namespace {

bool passes_formats_on(const std::string& type) {
    static const std::unordered_set<std::string> types{"Add", "Axpy", "Cast", "Gelu", "Mul", "Muls", "RealDiv", "Relu",
                                                       "Sigmoid", "Sub", "Swish"};
    return types.count(type) != 0;
}

class Converter {
public:
    explicit Converter(Compiled& compiled) : compiled_(compiled) {}

    void run() {
        std::vector<Step> steps = std::move(compiled_.steps);
        compiled_.steps.clear();
        for (Step& step : steps) {
            if (step.node->type == "Conv2D") {
                step.inputs[0] = in_format(step.inputs[0], ACL_FORMAT_NC1HWC0);
                step.inputs[1] = in_format(step.inputs[1], ACL_FORMAT_FRACTAL_Z);
                formats_[step.outputs[0]] = ACL_FORMAT_NC1HWC0;
            } else if (stays_blocked(step)) {
                for (int& input : step.inputs) {
                    if (is_map(input)) input = in_format(input, ACL_FORMAT_NC1HWC0);
                }
                formats_[step.outputs[0]] = ACL_FORMAT_NC1HWC0;
            } else if (!takes_private_formats(step)) {
                for (int& input : step.inputs) input = in_format(input, ACL_FORMAT_ND);
            }
            compiled_.steps.push_back(std::move(step));
        }
        for (int& output : compiled_.outputs) output = in_format(output, ACL_FORMAT_ND);
    }

private:
    // The matrix products read weights as they are stored.
    static bool takes_private_formats(const Step& step) {
        const std::string& type = step.node->type;
        return type.find("MatMul") != std::string::npos || type == "WeightQuantBatchMatmulV2" || type == "GroupedMatmul";
    }

    bool is_map(int value) const { return value >= 0 && compiled_.values[value].sizes.size() == 4; }

    bool stays_blocked(const Step& step) const {
        if (!passes_formats_on(step.node->type)) return false;
        bool blocked = false;
        for (int input : step.inputs) {
            if (input < 0) continue;
            const bool scalar = c10::multiply_integers(compiled_.values[input].sizes) == 1;
            if (!is_map(input) && !scalar) return false;
            blocked |= format_of(input) == ACL_FORMAT_NC1HWC0;
        }
        return blocked;
    }

    int format_of(int value) const {
        const int memory = compiled_.values[value].memory;
        const Value& base = compiled_.values[memory];
        if (is_private(base.format)) return base.format;
        const auto found = formats_.find(memory);
        return found == formats_.end() ? ACL_FORMAT_ND : found->second;
    }

    // The value itself, or that of a TransData of it; of a view, the view of one.
    int in_format(int value, int format) {
        if (value < 0 || format_of(value) == format) return value;
        const int memory = compiled_.values[value].memory;
        const auto [found, added] = converted_.emplace(std::make_pair(memory, format), 0);
        if (added) found->second = convert(memory, format);
        if (value == memory) return found->second;
        Value view = compiled_.values[value];
        view.memory = found->second;
        view.place = Value::Place::kFeature;
        compiled_.values.push_back(std::move(view));
        return static_cast<int>(compiled_.values.size()) - 1;
    }

    int convert(int source, int format) {
        const int index = static_cast<int>(compiled_.values.size());
        Value value;
        value.dtype = compiled_.values[source].dtype;
        value.sizes = compiled_.values[source].sizes;
        value.memory = index;
        compiled_.values.push_back(std::move(value));
        auto node = std::make_unique<Node>();
        node->name = "TransData_" + std::to_string(index);
        node->type = "TransData";
        node->input_descs.emplace_back().name = "src";
        node->output_descs.emplace_back().name = "dst";
        node->attributes = {{"src_format", format_name(format_of(source))}, {"dst_format", format_name(format)}};
        formats_[index] = format;
        compiled_.steps.push_back({node.get(), find_operation("TransData"), {source}, {index}});
        compiled_.changed.push_back(std::move(node));
        return index;
    }

    Compiled& compiled_;
    std::map<int, int> formats_;                       // of values that are not plain
    std::map<std::pair<int, int>, int> converted_;  // by value and format
};

}  // namespace

void convert_formats(Compiled& compiled) { Converter(compiled).run(); }

}  // namespace cann::graph
