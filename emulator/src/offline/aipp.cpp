#include "offline/aipp.h"

#include <fstream>
#include <set>
#include <sstream>

#include "graph/operation.h"
#include "offline/onnx.h"
#include "offline/precision.h"

namespace cann::offline {
namespace {

[[noreturn]] void refuse(const std::string& reason) {
    throw Refusal("E10052", "AIPP configuration is invalid. Reason: " + reason + ".");
}

bool is_yuv(const std::string& image) { return image == "YUV420SP_U8"; }

const std::map<std::string, int64_t>& channels() {
    static const std::map<std::string, int64_t> of{
        {"YUV420SP_U8", 1}, {"XRGB8888_U8", 4}, {"RGB888_U8", 3}, {"YUV400_U8", 1}};
    return of;
}

const std::set<std::string>& known_values() {
    static const std::set<std::string> names = [] {
        std::set<std::string> all{"related_input_rank", "src_image_size_w", "src_image_size_h", "crop",
                                  "load_start_pos_w", "load_start_pos_h", "crop_size_w", "crop_size_h", "padding",
                                  "left_padding_size", "right_padding_size", "top_padding_size", "bottom_padding_size",
                                  "padding_value", "csc_switch", "rbuv_swap_switch", "ax_swap_switch"};
        for (const char* row : {"matrix_r0c", "matrix_r1c", "matrix_r2c", "input_bias_", "output_bias_"}) {
            for (const char* i : {"0", "1", "2"}) all.insert(std::string(row) + i);
        }
        for (const char* row : {"mean_chn_", "min_chn_", "var_reci_chn_"}) {
            for (const char* i : {"0", "1", "2", "3"}) all.insert(std::string(row) + i);
        }
        return all;
    }();
    return names;
}

// Words, braces and colons of a text in protobuf's format, without comments.
std::vector<std::string> words_of(std::istream& text) {
    std::vector<std::string> words;
    for (std::string line; std::getline(text, line);) {
        std::string spaced;
        for (char c : line.substr(0, line.find('#'))) {
            if (c == '{' || c == '}' || c == ':') {
                (spaced += ' ') += c;
                spaced += ' ';
            } else if (c != '"' && c != ',' && c != ';') {
                spaced += c;
            }
        }
        std::istringstream parts(spaced);
        for (std::string word; parts >> word;) words.push_back(word);
    }
    return words;
}

double number(const std::string& name, const std::string& text) {
    if (text == "true" || text == "false") return text == "true";
    size_t end = 0;
    double value = 0;
    try {
        value = std::stod(text, &end);
    } catch (const std::exception&) {
        end = 0;
    }
    if (end == 0 || end != text.size()) refuse("the value " + text + " of " + name + " is no number");
    return value;
}

void set(Aipp& operation, std::string& mode, const std::string& name, const std::string& text) {
    if (name == "aipp_mode") {
        mode = text;
    } else if (name == "input_format") {
        if (channels().count(text) == 0) refuse("the input_format " + text + " is not supported");
        operation.image = text;
    } else if (known_values().count(name) == 0) {
        refuse("the emulator does not know " + name);
    } else {
        operation.values[name] = number(name, text);
    }
}

// What a conversion of colours consists of where the configuration says nothing: YUV to BGR, or RGB to YUV
// (SetCscDefaultValue in compiler/graph/preprocess/insert_op/aipp_op.cc of hicann/ge).
void set_colours(Aipp& operation) {
    constexpr double from_yuv[] = {298, 516, 0, 298, -100, -208, 298, 0, 409};
    constexpr double to_yuv[] = {66, 129, 25, -38, -74, 112, 112, -94, -18};
    constexpr double bias[] = {16, 128, 128};
    for (int row = 0; row < 3; ++row) {
        const std::string number = std::to_string(row);
        for (int column = 0; column < 3; ++column) {
            const double* factors = is_yuv(operation.image) ? from_yuv : to_yuv;
            operation.values.emplace("matrix_r" + number + "c" + std::to_string(column), factors[3 * row + column]);
        }
        operation.values.emplace("input_bias_" + number, bias[row]);
        operation.values.emplace("output_bias_" + number, bias[row]);
    }
}

void check(const Aipp& operation, const std::string& mode) {
    if (mode != "static") {
        refuse(mode == "dynamic" ? "dynamic AIPP is not emulated" : "aipp_mode must be static or dynamic");
    }
    if (operation.image.empty()) refuse("input_format must be set for static AIPP");
    const double width = operation.value("src_image_size_w"), height = operation.value("src_image_size_h");
    if (width != 0 && (width < 2 || width > 4096)) refuse("src_image_size_w must be in [2, 4096] or 0");
    if (height != 0 && (height < 1 || height > 4096)) refuse("src_image_size_h must be in [1, 4096] or 0");
    if (is_yuv(operation.image) && (std::fmod(width, 2) != 0 || std::fmod(height, 2) != 0)) {
        refuse("src_image_size_w and src_image_size_h must be even for YUV420SP_U8");
    }
    const bool is_odd = std::fmod(operation.value("load_start_pos_w"), 2) != 0 || std::fmod(operation.value("load_start_pos_h"), 2) != 0;
    if (is_yuv(operation.image) && operation.value("crop") != 0 && is_odd) {
        refuse("load_start_pos_w and load_start_pos_h must be even for YUV420SP_U8");
    }
    const bool resized = operation.value("crop") != 0 || operation.value("padding") != 0;
    if (resized && (width == 0 || height == 0)) {
        refuse("src_image_size_w and src_image_size_h must be set where crop or padding is");
    }
}

// The picture that a model of [N, C, height, width] needs; it may only differ where crop and padding say so.
graph::Ints picture(Aipp& operation, const graph::Ints& model) {
    if (model.size() != 4) refuse("the input that AIPP is for must have four dimensions");
    const bool crop = operation.value("crop") != 0, padding = operation.value("padding") != 0;
    const bool is_open = model[2] == -1 || model[3] == -1;
    if (is_open && (crop || padding)) refuse("When --dynamic_image_size is set, crop and padding cannot be set to 'true'");
    int64_t height = model[2], width = model[3];
    if (padding) {
        height -= static_cast<int64_t>(operation.value("top_padding_size") + operation.value("bottom_padding_size"));
        width -= static_cast<int64_t>(operation.value("left_padding_size") + operation.value("right_padding_size"));
    }
    const int64_t source_height = static_cast<int64_t>(operation.value("src_image_size_h", 0));
    const int64_t source_width = static_cast<int64_t>(operation.value("src_image_size_w", 0));
    if (crop) {
        for (auto [name, size] : {std::pair<const char*, int64_t>{"crop_size_h", height}, {"crop_size_w", width}}) {
            double& chosen = operation.values[name];
            if (chosen == 0) chosen = static_cast<double>(size);
            if (chosen != static_cast<double>(size)) refuse(std::string(name) + " is not what the model needs");
        }
        const bool fits = operation.value("load_start_pos_h") + static_cast<double>(height) <= operation.value("src_image_size_h") &&
                          operation.value("load_start_pos_w") + static_cast<double>(width) <= operation.value("src_image_size_w");
        if (!fits) refuse("load_start_pos and crop_size reach beyond src_image_size");
        height = source_height;
        width = source_width;
    }
    if ((source_height != 0 && source_height != height) || (source_width != 0 && source_width != width)) {
        refuse("the picture of " + std::to_string(source_width) + "x" + std::to_string(source_height) + " does not become " +
               "the model's " + std::to_string(model[3]) + "x" + std::to_string(model[2]));
    }
    if (width != -1 && (width < 2 || width > 4096)) refuse("the width of the picture must be in [2, 4096]");
    if (is_yuv(operation.image) && height != -1) height += height / 2;
    return {model[0], height, width, channels().at(operation.image)};
}

}  // namespace

double Aipp::value(const char* name, double otherwise) const {
    const auto found = values.find(name);
    return found == values.end() ? otherwise : found->second;
}

double stored_heights(const std::string& image) { return is_yuv(image) ? 1.5 : 1; }

std::vector<Aipp> parse_aipp(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw Refusal("E10001", "Value " + path + " for parameter --insert_op_conf is invalid. Reason: the file "
                             "cannot be read.");
    const std::vector<std::string> words = words_of(file);
    std::vector<Aipp> operations;
    for (size_t i = 0; i < words.size(); ++i) {
        if (words[i] != "aipp_op") refuse("aipp_op is expected, and not " + words[i]);
        i += words.size() > i + 1 && words[i + 1] == ":" ? 2 : 1;
        if (i >= words.size() || words[i] != "{") refuse("aipp_op must be followed by {");
        Aipp operation;
        std::string mode;
        for (++i; i < words.size() && words[i] != "}"; i += 3) {
            if (i + 2 >= words.size() || words[i + 1] != ":") refuse("a colon and a value must follow " + words[i]);
            set(operation, mode, words[i], words[i + 2]);
        }
        if (i >= words.size()) refuse("a } is missing");
        check(operation, mode);
        set_colours(operation);
        operation.input = static_cast<int64_t>(operation.value("related_input_rank"));
        operation.values.erase("related_input_rank");
        operations.push_back(std::move(operation));
    }
    if (operations.empty()) refuse("it has no aipp_op");
    return operations;
}

void insert_aipp(graph::Graph& graph, const std::vector<Aipp>& operations, std::vector<graph::Ints>& sizes) {
    std::vector<std::string> inputs;
    for (const graph::Node& node : graph.nodes) {
        if (node.type == "Data") inputs.push_back(node.name);
    }
    for (Aipp operation : operations) {
        if (operation.input < 0 || operation.input >= static_cast<int64_t>(inputs.size())) {
            refuse("the model has no input " + std::to_string(operation.input));
        }
        const std::string& name = inputs[operation.input];
        graph::Ints& input = sizes[operation.input];
        graph::Node aipp;
        aipp.name = name + "_aipp";
        aipp.type = "Aipp";
        aipp.inputs = {{name, 0}};
        aipp.input_descs.emplace_back().name = "images";
        aipp.output_descs.emplace_back().name = "features";
        const graph::Ints model = input;
        input = picture(operation, model);
        for (const auto& [key, value] : operation.values) aipp.attributes[key] = value;
        aipp.attributes["image"] = operation.image;
        aipp.attributes["channels"] = model[1];
        graph::Node* data = nullptr;
        for (graph::Node& node : graph.nodes) {
            if (node.name == name) data = &node;
        }
        const graph::Node cast = make_cast(name + "_aipp_cast", {aipp.name, 0}, data->output_descs[0].dtype.value());
        data->output_descs[0].dtype = at::kByte;
        redirect(graph, name, cast.name);
        graph.nodes.push_back(std::move(aipp));
        graph.nodes.push_back(cast);
    }
}

}  // namespace cann::offline

namespace cann::graph {
namespace {

Tensor channel(const Tensor& image, int64_t index) { return image.select(-1, index); }

// The three channels of a picture, or the one, as [N, H, W] each.
std::vector<Tensor> channels_of(const Operands& x, const Tensor& image, const std::string& format) {
    const bool swapped = x.real("rbuv_swap_switch", 0) != 0, alpha_first = x.real("ax_swap_switch", 0) != 0;
    if (format == "YUV400_U8") return {channel(image, 0)};
    if (format == "YUV420SP_U8") {
        const int64_t height = image.size(1) * 2 / 3, width = image.size(2);
        const Tensor colours = image.narrow(1, height, height / 2).reshape({image.size(0), height / 2, width / 2, 2});
        const Tensor full = colours.repeat_interleave(2, 1).repeat_interleave(2, 2);
        return {channel(image.narrow(1, 0, height), 0), channel(full, swapped), channel(full, !swapped)};
    }
    const int64_t first = format == "XRGB8888_U8" && alpha_first ? 1 : 0;
    std::vector<Tensor> all{channel(image, first), channel(image, first + 1), channel(image, first + 2)};
    if (swapped) std::swap(all[0], all[2]);
    return all;
}

// Another colour space, by a matrix of numbers in 1/256: from YUV, whose offsets go first, or to it, with offsets last
// (config_file_template.md).
std::vector<Tensor> converted(const Operands& x, const std::vector<Tensor>& from, bool is_from_yuv) {
    const auto bias = [&](const char* side, size_t i) {
        return static_cast<int64_t>(x.real((side + ("_bias_" + std::to_string(i))).c_str(), 0));
    };
    std::vector<Tensor> to;
    for (size_t row = 0; row < 3; ++row) {
        const std::string name = "matrix_r" + std::to_string(row) + "c";
        Tensor sum;
        for (size_t i = 0; i < from.size(); ++i) {
            const int64_t factor = static_cast<int64_t>(x.real((name + std::to_string(i)).c_str(), 0));
            const Tensor part = (from[i] - (is_from_yuv ? bias("input", i) : 0)) * factor;
            sum = sum.defined() ? sum + part : part;
        }
        to.push_back((at::div(sum, 256, "floor") + (is_from_yuv ? 0 : bias("output", row))).clamp(0, 255));
    }
    return to;
}

// The order of config_file_template.md: swap, crop, colours, normalise, pad.
Tensor preprocessed(const Operands& x) {
    const std::string format = x.text("image", "");
    std::vector<Tensor> all = channels_of(x, x[0].to(at::kInt), format);
    if (x.real("crop", 0) != 0) {
        for (Tensor& one : all) {
            one = one.narrow(1, static_cast<int64_t>(x.real("load_start_pos_h", 0)), static_cast<int64_t>(x.real("crop_size_h", 0)))
                     .narrow(2, static_cast<int64_t>(x.real("load_start_pos_w", 0)), static_cast<int64_t>(x.real("crop_size_w", 0)));
        }
    }
    if (x.real("csc_switch", 0) != 0) all = converted(x, all, format == "YUV420SP_U8");
    TORCH_CHECK(static_cast<int64_t>(all.size()) >= x.integer("channels"), "AIPP makes ", all.size(), " channels, and the ",
                "model needs ", x.integer("channels"));
    all.resize(x.integer("channels"));  // a grey result is the first row of a conversion
    for (size_t i = 0; i < all.size(); ++i) {
        const std::string number = std::to_string(i);
        const double mean = x.real(("mean_chn_" + number).c_str(), 0), least = x.real(("min_chn_" + number).c_str(), 0);
        all[i] = (all[i].to(at::kFloat) - mean - least) * x.real(("var_reci_chn_" + number).c_str(), 1);
    }
    const Tensor features = at::stack(all, 1);
    if (x.real("padding", 0) == 0) return features;
    const auto side = [&](const char* name) { return static_cast<int64_t>(x.real(name, 0)); };
    return at::constant_pad_nd(features, {side("left_padding_size"), side("right_padding_size"), side("top_padding_size"),
                                          side("bottom_padding_size")}, x.real("padding_value", 0));
}

// What the configuration may have and this call does not need.
Tensor all_read(const Operands& x, const Tensor& result) {
    for (const std::string& name : x.unread_attributes()) x.real(name.c_str(), 0);
    return result;
}

}  // namespace
}  // namespace cann::graph

GE(Aipp, as(at::kHalf, all_read(x, preprocessed(x))))
