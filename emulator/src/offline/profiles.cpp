#include "offline/profiles.h"

#include <algorithm>
#include <set>

#include "offline/onnx.h"
#include "offline/text.h"

namespace cann::offline {
namespace {

constexpr size_t kFewest = 2, kMost = 100;  // profiles; --dynamic_dims.md
const char* const kSample = "\"input_name1:n1,c1,h1,w1\"";

[[noreturn]] void refuse_shape(const std::string& shape, const std::string& reason) {
    throw Refusal("E10002", "Value " + shape + " for parameter --input_shape is invalid. Reason: " + reason +
                  ". The value must be formatted as " + kSample + ".");
}

[[noreturn]] void refuse(const char* code, const std::string& option, const std::string& value,
                         const std::string& reason) {
    throw Refusal(code, "Value " + value + " for parameter --" + option + " is invalid. Reason: " + reason);
}

int64_t number(const std::string& text, const std::string& shape) {
    if (text.find('.') != std::string::npos) refuse_shape(shape, "The float number is unsupported");
    const bool is_minus = !text.empty() && text[0] == '-';
    const std::string digits = text.substr(is_minus);
    if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) {
        refuse_shape(shape, "It is not a digit");
    }
    try {
        return std::stoll(text);
    } catch (const std::out_of_range&) {
        throw Refusal("E10013", "Value " + text + " for --input_shape is out of range.");
    }
}

std::vector<std::pair<std::string, Ints>> parse_given(const std::string& input_shape) {
    std::vector<std::pair<std::string, Ints>> given;
    for (const std::string& shape : split(input_shape, ';')) {
        const size_t colon = shape.rfind(':');
        if (colon == std::string::npos) refuse_shape(shape, "The shape must contain two parts: name and value");
        Ints sizes;
        for (const std::string& size : split(shape.substr(colon + 1), ',')) sizes.push_back(number(size, shape));
        given.emplace_back(trim(shape.substr(0, colon)), std::move(sizes));
    }
    return given;
}

int64_t open(const Ints& sizes) { return std::count(sizes.begin(), sizes.end(), -1); }

void check_batch(const Shapes& shapes, const std::string& value) {
    bool found = false;
    for (const auto& [name, sizes] : shapes.given) {
        if (sizes.empty()) {
            throw Refusal("E10012", "--dynamic_batch_size is included, but the dimension count of the dynamic-shape input "
                          "configured in --input_shape is less than 1.");
        }
        for (size_t i = 1; i < sizes.size() && sizes[0] == -1; ++i) {
            if (sizes[i] >= 0) continue;
            throw Refusal("E10018", "Value " + std::to_string(sizes[i]) + " for shape " + std::to_string(i) +
                          " is invalid. When --dynamic_batch_size is included, only batch size N can be -1 in "
                          "--input_shape.");
        }
        found |= sizes[0] == -1;
    }
    if (!found) {
        throw Refusal("E10031", "--dynamic_batch_size is included, but none of the nodes specified in --input_shape has a "
                      "batch size equaling -1.");
    }
    if (value.find_first_not_of("0123456789,") != std::string::npos) {
        refuse("E10003", "dynamic_batch_size", value, "It can only contain digits and \",\".");
    }
}

void check_image(const Shapes& shapes, const std::string& format, const std::string& value) {
    bool found = false;
    for (const auto& [name, sizes] : shapes.given) {
        if (open(sizes) == 0) continue;
        if (format != "NCHW" && format != "NHWC") {
            refuse("E10003", "input_format", format,
                   "When --dynamic_image_size is set, the input format only supports NCHW or NHWC.");
        }
        const size_t height = format == "NCHW" ? 2 : 1;
        if (sizes.size() != 4 || open(sizes) != 2 || sizes[height] != -1 || sizes[height + 1] != -1) {
            throw Refusal("E10019", "When --dynamic_image_size is included, only the height and width axes can be -1 in "
                          "--input_shape.");
        }
        found = true;
    }
    if (!found) {
        throw Refusal("E10019", "When --dynamic_image_size is included, only the height and width axes can be -1 in "
                      "--input_shape.");
    }
    if (value.find_first_not_of("0123456789,; ") != std::string::npos) {
        refuse("E10003", "dynamic_image_size", value, "It can only contain digits, \",\", \" \" and \";\".");
    }
    for (const std::string& gear : split(value, ';')) {
        if (split(gear, ',').size() == 2) continue;
        throw Refusal("E10020", "Value " + value + " for parameter --dynamic_image_size is invalid.");
    }
}

void check_dims(const Shapes& shapes, const std::string& value) {
    int64_t count = 0;
    for (const auto& [name, sizes] : shapes.given) count += open(sizes);
    if (count == 0) {
        refuse("E10001", "input_shape's dynamic dim num", "0", "At least one dim should be -1 when dynamic_dims is set.");
    }
    for (const std::string& gear : split(value, ';')) {
        const std::vector<std::string> dims = split(gear, ',');
        if (static_cast<int64_t>(dims.size()) != count) {
            refuse("E10003", "dynamic_dims", value,
                   "Each setting needs to be consistent with the number of -1 in the input shape.");
        }
        for (const std::string& dim : dims) {
            if (!dim.empty() && dim.find_first_not_of("0123456789") == std::string::npos) continue;
            refuse("E10001", "dynamic_dims", dim, "Dynamic dims must be a positive integer.");
        }
    }
}

Ints numbers(const std::string& gear, const char* option) {
    Ints values;
    for (const std::string& text : split(gear, ',')) {
        try {
            values.push_back(std::stoll(text));
        } catch (const std::exception&) {
            refuse("E10003", option, gear, "It is no number that fits.");
        }
        if (values.back() > 0) continue;
        throw Refusal("E10038", "Dimension size " + text + " is invalid. The value must be greater than 0.");
    }
    return values;
}

void check_gears(const std::vector<Ints>& gears) {
    const std::string options = "--dynamic_batch_size, --dynamic_image_size, or --dynamic_dims";
    const std::string count = std::to_string(gears.size());
    if (gears.size() < kFewest) {
        throw Refusal("E10035", options + " has " + count + " profiles, which is less than the minimum 2.");
    }
    if (gears.size() > kMost) {
        throw Refusal("E10036", options + " has " + count + " profiles, which is greater than the maximum 100.");
    }
    for (const Ints& gear : gears) {
        if (gear.size() == gears[0].size()) continue;
        throw Refusal("E10037", "The profiles configured in " + options + " have inconsistent dimension counts. A profile "
                      "has " + std::to_string(gears[0].size()) + " dimensions while another has " +
                      std::to_string(gear.size()) + " dimensions.");
    }
    if (std::set<Ints>(gears.begin(), gears.end()).size() != gears.size()) {
        throw Refusal("E10039", "The " + options + " argument has duplicate profiles.");
    }
}

const char* option_of(Dynamic dynamic) {
    switch (dynamic) {
        case Dynamic::kBatch: return "dynamic_batch_size";
        case Dynamic::kImage: return "dynamic_image_size";
        default: return "dynamic_dims";
    }
}

// Ranges, or -1 that no profile fills in: ATC makes a model of unlimited shapes then.
void refuse_ranges(const ShapeOptions& options) {
    const bool is_open = options.input_shape.find('~') != std::string::npos ||
                         options.input_shape.find("-1") != std::string::npos || !options.input_shape_range.empty();
    if (!is_open) return;
    throw Refusal("E10055", "The operation is not supported. Reason: the emulator has no models of unlimited shapes; give "
                  "--dynamic_batch_size, --dynamic_image_size or --dynamic_dims beside -1 in --input_shape.");
}

}  // namespace

Shapes parse_shapes(const ShapeOptions& options) {
    const bool has_batch = !options.dynamic_batch_size.empty(), has_image = !options.dynamic_image_size.empty();
    const bool has_dims = !options.dynamic_dims.empty(), has_range = !options.input_shape_range.empty();
    const bool is_dynamic = has_batch || has_image || has_dims;
    if (is_dynamic && options.input_shape.find('~') != std::string::npos) {
        throw Refusal("E10040", "As the --dynamic_batch_size, --dynamic_image_size, or --dynamic_dims argument is included, "
                      "the corresponding nodes specified in --input_shape must have -1 axes and cannot have '~'.");
    }
    if (has_batch + has_image + has_dims + has_range > 1) {
        throw Refusal("E10009", "--dynamic_batch_size, --dynamic_image_size, --input_shape_range, and --dynamic_dims are "
                      "mutually exclusive.");
    }
    if (!is_dynamic) refuse_ranges(options);
    if (is_dynamic && options.input_shape.empty()) throw Refusal("E10004", "Value for --input_shape is empty.");
    Shapes shapes;
    shapes.given = parse_given(options.input_shape);
    if (!is_dynamic) return shapes;
    shapes.dynamic = has_batch ? Dynamic::kBatch : has_image ? Dynamic::kImage : Dynamic::kDims;
    const std::string& value = has_batch ? options.dynamic_batch_size
                               : has_image ? options.dynamic_image_size : options.dynamic_dims;
    if (has_batch) check_batch(shapes, value);
    if (has_image) check_image(shapes, options.input_format.empty() ? "NCHW" : options.input_format, value);
    if (has_dims) check_dims(shapes, value);
    for (const std::string& gear : split(value, has_batch ? ',' : ';')) {
        shapes.gears.push_back(numbers(gear, option_of(shapes.dynamic)));
    }
    check_gears(shapes.gears);
    return shapes;
}

std::vector<Ints> input_sizes(const graph::Graph& graph, const Shapes& shapes) {
    for (const auto& [name, sizes] : shapes.given) {
        const auto found = std::find_if(graph.nodes.begin(), graph.nodes.end(), [&](const auto& n) { return n.name == name; });
        if (found == graph.nodes.end()) {
            throw Refusal("E10016", "Op name " + name + " specified in --input_shape is not found in the model. Confirm "
                          "whether this node name exists, or whether the node is not split with the specified delimiter "
                          "';'.");
        }
        if (found->type != "Data") {
            throw Refusal("E10017", "Input Op " + name + " specified in --input_shape is invalid. The Op type must be Data.");
        }
    }
    std::vector<Ints> inputs;
    for (const graph::Node& node : graph.nodes) {
        if (node.type != "Data") continue;
        Ints sizes = node.output_descs.at(0).sizes;
        bool is_given = false;
        for (const auto& [name, given] : shapes.given) {
            if (name != node.name) continue;
            is_given = true;
            if (given.size() != sizes.size()) {
                throw Refusal("E10049", "Dimension count " + std::to_string(given.size()) + " configured in --input_shape "
                              "does not match dimension count " + std::to_string(sizes.size()) + " of the node.");
            }
            sizes = given;
        }
        if (open(sizes) > 0 && (shapes.dynamic == Dynamic::kNone || !is_given)) {
            refuse("E10001", "input_shape", "NULL", "The shapes of inputs contain -1 in the model. You may need to set "
                   "input shape to specify its shape.");
        }
        inputs.push_back(std::move(sizes));
    }
    return inputs;
}

std::vector<Ints> fill(std::vector<Ints> sizes, Dynamic dynamic, const Ints& gear) {
    size_t next = 0;
    for (Ints& input : sizes) {
        for (int64_t& size : input) {
            if (size != -1) continue;
            size = gear.at(next++);
            if (dynamic == Dynamic::kBatch) next = 0;
        }
        if (dynamic == Dynamic::kImage) next = 0;
    }
    return sizes;
}

}  // namespace cann::offline
