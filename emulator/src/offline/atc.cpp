// The command `atc` (api/atc/main_impl.cc of hicann/ge has the order of its checks; error_codes/*.md the texts).
#include "offline/atc.h"

#include <sys/stat.h>
#include <unistd.h>

#include <climits>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <set>

#include "offline/files.h"
#include "offline/onnx.h"
#include "runtime/runtime.h"

namespace cann::offline {
namespace {

constexpr int kOnnx = 5;
constexpr int kFailed = 255;  // what is left of -1

[[noreturn]] void refuse(const std::string& option, const std::string& value, const std::string& reason) {
    throw Refusal("E10001", "Value " + value + " for parameter --" + option + " is invalid. Reason: " + reason);
}

void require(const CommandLine& line, const std::string& option) {
    if (!line.text(option).empty()) return;
    throw Refusal("E10054", "The required parameter --" + option + " for ATC is empty. Another possible reason is that the "
                  "values of some parameters are not enclosed by quotation marks (\"\").");
}

// Letters, digits, what a path consists of, and Chinese, U+4E00 to U+9FA5 (IsPathCharsValid in base/common/util.cc of
// hicann/ge), which UTF-8 writes in three bytes.
bool has_valid_characters(const std::string& path) {
    for (size_t i = 0; i < path.size(); ++i) {
        const auto byte = [&](size_t at) { return at < path.size() ? static_cast<unsigned char>(path[at]) : 0U; };
        if (byte(i) < 0x80) {
            if (std::isalnum(byte(i)) == 0 && std::strchr("_-./", path[i]) == nullptr) return false;
            continue;
        }
        const bool is_three = byte(i) >> 4 == 0xE && byte(i + 1) >> 6 == 2 && byte(i + 2) >> 6 == 2;
        const unsigned code = (byte(i) & 0xF) << 12 | (byte(i + 1) & 0x3F) << 6 | (byte(i + 2) & 0x3F);
        if (!is_three || code < 0x4E00 || code > 0x9FA5) return false;
        i += 2;
    }
    return true;
}

void check_characters(const std::string& option, const std::string& path) {
    if (!has_valid_characters(path)) {
        refuse(option, path, "The path can only contain 'a-z' 'A-Z' '0-9' '-' '.' '_' and Chinese characters.");
    }
}

void check_framework(const CommandLine& line) {
    const int64_t framework = line.number("framework", -1);
    const std::string all = "0(Caffe) or 1(MindSpore) or 3(TensorFlow) or 5(Onnx)";
    if (framework == -1) throw Refusal("E10007", "--framework is required. The value must be " + all + ".");
    if (framework == 0 && line.text("weight").empty()) {
        throw Refusal("E10008", "--weight must not be empty when --framework is set to 0 (Caffe).");
    }
    if (framework == 0 && chip().inf_nan) refuse("framework", "0", "Caffe is not supported in the current soc version.");
    if (framework == 0 || framework == 1 || framework == 3) {
        throw Refusal("E10055", "The operation is not supported. Reason: the emulator's atc converts only ONNX, --framework=5.");
    }
    if (framework != kOnnx) refuse("framework", line.text("framework"), "The value must be " + all + ".");
}

void check_implmode(const CommandLine& line) {
    static const std::set<std::string> modes{"", "high_performance", "high_precision", "high_precision_for_all",
                                             "high_performance_for_all", "enable_float_32_execution",
                                             "enable_hi_float_32_execution"};
    const std::string mode = line.text("op_select_implmode");
    if (!line.text("optypelist_for_implmode").empty() && mode.empty()) {
        refuse("op_select_implmode", mode, "Parameters --op_select_implmode and --optypelist_for_implmode must be set at the "
               "same time.");
    }
    if (modes.count(mode) == 0) {
        refuse("op_select_implmode", mode, "The value must be high_performance, high_precision, high_precision_for_all, "
               "high_performance_for_all.");
    }
}

void check_log(const CommandLine& line) {
    static const std::set<std::string> levels{"debug", "info", "warning", "error", "null"};
    if (levels.count(line.text("log", "null")) != 0) return;
    throw Refusal("E10010", "Value " + line.text("log") + " for parameter --log is invalid.");
}

BuildOptions build_options(const CommandLine& line) {
    BuildOptions options;
    options.shapes = {line.text("input_shape"), line.text("input_shape_range"), line.text("input_format", "NCHW"),
                      line.text("dynamic_batch_size"), line.text("dynamic_image_size"), line.text("dynamic_dims")};
    options.soc_version = line.text("soc_version");
    options.precision_mode = line.text("precision_mode");
    options.precision_mode_v2 = line.text("precision_mode_v2");
    if (!line.text("insert_op_conf").empty()) options.insert_op_conf = input_path(line, "insert_op_conf");
    options.output_type = line.text("output_type");
    options.out_nodes = line.text("out_nodes");
    options.input_fp16_nodes = line.text("input_fp16_nodes");
    options.command_line = line.whole();
    return options;
}

// What the command line and the path of the model must fulfil; returns that path.
std::string check_line(const CommandLine& line, bool writes) {
    check_framework(line);
    require(line, "soc_version");
    if (writes) require(line, "output");
    require(line, "model");
    const std::string model = input_path(line, "model");
    if (writes) {
        check_output_path(line.text("output"), "output");
        if (line.text("output").find_last_of("/\\") + 1 == line.text("output").size()) {
            throw Refusal("E10022", "Path " + line.text("output") + " for parameter --output does not include the file name.");
        }
    }
    check_implmode(line);
    if (line.text("is_weight_clip", "1") != "1") {
        refuse("is_weight_clip", line.text("is_weight_clip"), "the emulator's atc always clips.");
    }
    check(build_options(line));
    return model;
}

int fail_with(const std::string& code, const std::string& text) {
    std::cout << "ATC run failed, Please check the detail log, Try 'atc --help' for more information\n"
              << (code.empty() ? "E19999" : code) << ": " << text << std::endl;
    return kFailed;
}

void run(const CommandLine& line) {
    check_log(line);
    switch (line.number("mode", 0)) {
        case 0: return convert(line);
        case 1: return write_json(line);
        case 3: return check_model(line);
        case 6: return show_model(line);
        default:
            refuse("mode", line.text("mode"), "The value must be selected from the following: 0(model to framework model), "
                   "1(framework model to json), 3(only pre-check), 6(display model info).");
    }
}

}  // namespace

std::string input_path(const CommandLine& line, const std::string& option) {
    const std::string path = line.text(option);
    std::error_code unknown;
    check_characters(option, std::filesystem::weakly_canonical(path, unknown).string());  // behind all links
    struct stat status = {};
    const bool is_there = stat(path.c_str(), &status) == 0 && access(path.c_str(), R_OK) == 0;
    if (!is_there) refuse(option, path, "[Error " + std::to_string(errno) + "] " + std::strerror(errno) + ".");
    if (!S_ISREG(status.st_mode)) refuse(option, path, "It is no file.");
    return path;
}

void check_output_path(const std::string& path, const std::string& option) {
    if (path.size() >= PATH_MAX) {
        throw Refusal("E10021", "Path for parameter --" + option + " is too long. Keep the length within " +
                      std::to_string(PATH_MAX) + ".");
    }
    check_characters(option, path);
    std::error_code error;
    const std::filesystem::path directory = std::filesystem::path(path).parent_path();
    if (!directory.empty()) std::filesystem::create_directories(directory, error);
    const std::string place = directory.empty() ? "." : directory.string();
    if (error || access(place.c_str(), W_OK) != 0) {
        const int reason = error ? error.value() : errno;
        refuse(option, path, "[Error " + std::to_string(reason) + "] " + std::strerror(reason) + ".");
    }
}

void convert(const CommandLine& line) {
    const std::string model = check_line(line, true);
    const std::string output = line.text("output");
    OfflineModel built = build(read_model(model), std::filesystem::path(output).filename().string(), build_options(line));
    write_whole(output.ends_with(".om") ? output : output + ".om", serialize(built));
    if (line.text("display_model_info", "0") == "1") print_model(output.ends_with(".om") ? output : output + ".om");
}

void check_model(const CommandLine& line) {
    const std::string model = check_line(line, false);
    const std::string report = line.text("check_report", "check_result.json");
    check_output_path(report, "check_report");
    try {
        input_sizes(read_model(model), parse_shapes(build_options(line).shapes));
    } catch (const Refusal& refusal) {
        const std::string problem = refusal.code + ": " + refusal.what();
        write_whole(report, "{\"model\": " + quoted(model) + ", \"result\": \"failed\", \"reason\": " + quoted(problem) + "}\n");
        throw;
    }
    write_whole(report, "{\"model\": " + quoted(model) + ", \"result\": \"success\"}\n");
}

}  // namespace cann::offline

extern "C" __attribute__((visibility("default"))) int cann_emulator_atc(int count, char** arguments) {
    using namespace cann::offline;
    std::cout << "ATC start working now, please wait for a moment." << std::endl;
    try {
        const CommandLine line(count, arguments);
        if (line.has("help") || line.has("h")) {
            std::cout << "usage: atc <args>\n"
                      << "example: atc --model=model.onnx --framework=5 --output=model --soc_version=<soc_version>\n"
                      << help_of_options();
            return 0;
        }
        run(line);
    } catch (const Refusal& refusal) {
        if (!refusal.code.empty()) return fail_with(refusal.code, refusal.what());
        std::cout << refusal.what() << std::endl;  // a command line that cannot be read
        return fail_with("E19999", "Internal Error! An unknown error occurred. Please check the log.");
    } catch (const std::exception& error) {
        return fail_with("E19999", error.what());
    }
    std::cout << "...\nATC run success, welcome to the next use." << std::endl;
    return 0;
}
