// ATC's other modes: what is in a model, as text and as JSON.
#include <filesystem>
#include <iostream>
#include <sstream>

#include "offline/atc.h"
#include "offline/files.h"
#include "offline/onnx.h"
#include "ops/tensor.h"

namespace cann::offline {
namespace {

template <class List, class Text>
std::string joined(const List& list, Text text) {
    std::string all = "[";
    for (const auto& element : list) all += (all.size() == 1 ? "" : ", ") + text(element);
    return all + "]";
}

std::string sizes_text(const Ints& sizes) {
    return joined(sizes, [](int64_t size) { return std::to_string(size); });
}

std::string port_text(const Port& port) {
    return "{\"name\": " + quoted(port.name) + ", \"dtype\": " + quoted(dtype_name(port.dtype)) + ", \"shape\": " +
           sizes_text(port.sizes) + "}";
}

std::string node_text(const graph::Node& node) {
    return "{\"name\": " + quoted(node.name) + ", \"type\": " + quoted(node.type) + ", \"input\": " +
           joined(node.inputs, [](const graph::Source& source) {
               return quoted(source.node.empty() ? "" : source.node + ":" + std::to_string(source.index));
           }) + "}";
}

std::string graph_text(const graph::Graph& graph) {
    return "{\"name\": " + quoted(graph.name) + ", \"op\": " + joined(graph.nodes, node_text) + "}";
}

std::string model_text(const OfflineModel& model) {
    return "{\"name\": " + quoted(model.name) + ", \"soc_version\": " + quoted(model.soc) + ", \"atc_version\": " +
           quoted(model.version) + ", \"precision_mode\": " + quoted(model.precision) + ", \"input\": " +
           joined(model.inputs, port_text) + ", \"output\": " + joined(model.outputs, port_text) + ", \"graph\": " +
           joined(model.profiles, [](const Profile& profile) { return graph_text(*profile.compiled.graph); }) + "}\n";
}

// Other than ATC's checks of a command line, a file that is no model is E10041.
template <class Work>
auto reading(const std::string& path, Work work) {
    try {
        return work();
    } catch (const Unreadable& error) {
        throw Refusal("E10041", "Failed to load the model from " + path + ". Reason: " + error.what() + ".");
    }
}

}  // namespace

std::string quoted(const std::string& text) {
    std::ostringstream out;
    out << '"';
    for (unsigned char c : text) {
        if (c == '"' || c == '\\') {
            out << '\\' << c;
        } else if (c < 0x20) {
            out << "\\u00" << "0123456789abcdef"[c >> 4] << "0123456789abcdef"[c & 15];
        } else {
            out << c;
        }
    }
    out << '"';
    return out.str();
}

graph::Graph read_model(const std::string& path) {
    const MappedFile file(path);
    const std::string directory = std::filesystem::path(path).parent_path().string();
    return parse_onnx(file.content(), directory.empty() ? "." : directory);
}

void print_model(const std::string& path) {
    reading(path, [&] {
        const MappedFile file(path);
        const Parts parts = check_parts(file.content());
        const OfflineModel model = parse(parts);
        std::cout << "============ Display Model Info start ============\n"
                  << "Original Atc command line: " << model.command_line << "\n"
                  << "system   info: atc_version[" << model.version << "], soc_version[" << model.soc
                  << "], framework_type[5].\n"
                  << "resource info: memory_size[" << model.feature_bytes() << " B], weight_size[" << parts.weights.size()
                  << " B], stream_num[1], event_num[0].\n"
                  << "om       info: modeldef_size[" << parts.description.size() << " B], weight_data_size["
                  << parts.weights.size() << " B], tbe_kernels_size[0 B], cust_aicpu_kernel_store_size[0 B], "
                  << "task_info_size[0 B], so_store_size[0 B].\n"
                  << "============ Display Model Info end   ============" << std::endl;
    });
}

void show_model(const CommandLine& line) {
    if (line.text("om").empty()) throw Refusal("E10004", "Value for --om is empty.");
    const std::string path = input_path(line, "om");
    if (line.has("framework")) throw Refusal("E10057", "--om and --mode can only be used together.");
    print_model(path);
}

void write_json(const CommandLine& line) {
    const int64_t framework = line.number("framework", -1);
    if (framework != -1 && framework != 0 && framework != 3 && framework != 5) {
        throw Refusal("E10001", "Value " + line.text("framework") + " for parameter --framework is invalid. Reason: The "
                      "framework must be selected from {0(Caffe), 3(TensorFlow), 5(Onnx)} when model is set to 1(JSON).");
    }
    for (const char* option : {"om", "json"}) {
        if (line.text(option).empty()) throw Refusal("E10004", "Value for --" + std::string(option) + " is empty.");
    }
    const std::string path = input_path(line, "om");
    check_output_path(line.text("json"), "json");
    if (framework == 0 || framework == 3) {
        throw Refusal("E10055", "The operation is not supported. Reason: the emulator's atc reads only ONNX, --framework=5.");
    }
    if (framework == 5) return write_whole(line.text("json"), graph_text(read_model(path)) + "\n");
    reading(path, [&] {
        const MappedFile file(path);
        write_whole(line.text("json"), model_text(parse(check_parts(file.content()))));
    });
}

}  // namespace cann::offline
