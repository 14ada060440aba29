// ATC's options: those that the emulator heeds, those that change nothing here, and those that it does not have.
#include <array>

#include "offline/atc.h"
#include "offline/onnx.h"

namespace cann::offline {
namespace {

enum class Use {
    kHeeded,
    kSpeed,   // for speed, files and messages of the card's compiler: nothing here
    kMissing,
};

struct Option {
    const char* name;
    Use use;
    const char* help = "";
};

constexpr std::array kOptions{
    Option{"help", Use::kHeeded, "Show this text"},
    Option{"h", Use::kHeeded, "The same"},
    Option{"mode", Use::kHeeded, "0 (default): make an offline model; 1: write a model as JSON; 3: check only; 6: show a model's origin"},
    Option{"model", Use::kHeeded, "The model to convert"},
    Option{"framework", Use::kHeeded, "0: Caffe; 1: MindSpore; 3: TensorFlow; 5: ONNX (the emulator converts ONNX only)"},
    Option{"output", Use::kHeeded, "Where to write, without .om"},
    Option{"soc_version", Use::kHeeded, "The chip: \"Ascend\" and the Name of npu-smi info"},
    Option{"input_shape", Use::kHeeded, "\"name:n,c,h,w;name:n,c\"; -1 where a profile fills in"},
    Option{"input_format", Use::kHeeded, "NCHW (default), NCDHW or ND"},
    Option{"input_shape_range", Use::kHeeded, "Deprecated: use --input_shape"},
    Option{"dynamic_batch_size", Use::kHeeded, "Profiles of the batch: \"1,2,4\""},
    Option{"dynamic_image_size", Use::kHeeded, "Profiles of height and width: \"224,224;448,448\""},
    Option{"dynamic_dims", Use::kHeeded, "Profiles of all -1 in --input_shape: \"1,16;2,32\""},
    Option{"insert_op_conf", Use::kHeeded, "The configuration of AIPP"},
    Option{"precision_mode", Use::kHeeded, "force_fp16 (default), force_fp32, cube_fp16in_fp32out, allow_fp32_to_fp16, "
           "must_keep_origin_dtype, allow_mix_precision, allow_mix_precision_fp16, allow_mix_precision_bf16, allow_fp32_to_bf16"},
    Option{"precision_mode_v2", Use::kHeeded, "fp16 (default), origin, cube_fp16in_fp32out, mixed_float16, mixed_bfloat16"},
    Option{"output_type", Use::kHeeded, "The dtype of the outputs: FP32, FP16, UINT8, INT8, ...; \"node:0:FP16\" of one"},
    Option{"out_nodes", Use::kHeeded, "Which outputs, in which order: \"node:0;node:1\""},
    Option{"input_fp16_nodes", Use::kHeeded, "Inputs that are fed in float16: \"name;name\""},
    Option{"op_select_implmode", Use::kHeeded, "high_performance (default), high_precision, ..._for_all: no difference here"},
    Option{"optypelist_for_implmode", Use::kHeeded, "The operators that it is for"},
    Option{"om", Use::kHeeded, "The model to show or to write as JSON"},
    Option{"json", Use::kHeeded, "Where to write it"},
    Option{"check_report", Use::kHeeded, "Where --mode=3 writes its report (check_result.json)"},
    Option{"log", Use::kHeeded, "debug, info, warning, error or null (default)"},
    Option{"weight", Use::kHeeded, "The weights of a Caffe model"},
    Option{"display_model_info", Use::kHeeded, "1: show what --mode=6 shows, after the conversion"},
    Option{"is_weight_clip", Use::kHeeded, "1 (default): weights beyond float16 become its largest value"},
    Option{"ac_parallel_enable", Use::kSpeed}, Option{"aicore_num", Use::kSpeed}, Option{"allow_hf32", Use::kMissing},
    Option{"atomic_clean_policy", Use::kSpeed}, Option{"buffer_optimize", Use::kSpeed}, Option{"build_config", Use::kSpeed},
    Option{"cluster_config", Use::kMissing}, Option{"compress_weight_conf", Use::kMissing},
    Option{"compression_optimize_conf", Use::kMissing}, Option{"core_type", Use::kSpeed},
    Option{"customize_dtypes", Use::kMissing}, Option{"debug_dir", Use::kSpeed}, Option{"deterministic", Use::kSpeed},
    Option{"deterministic_level", Use::kSpeed}, Option{"disable_reuse_memory", Use::kSpeed},
    Option{"dump_mode", Use::kMissing}, Option{"enable_attr_compression", Use::kSpeed},
    Option{"enable_compress_weight", Use::kMissing}, Option{"enable_scope_fusion_passes", Use::kSpeed},
    Option{"enable_single_stream", Use::kSpeed}, Option{"enable_small_channel", Use::kSpeed},
    Option{"export_compile_stat", Use::kSpeed}, Option{"external_weight", Use::kMissing},
    Option{"fusion_switch_file", Use::kSpeed}, Option{"h2d_overlapped_with_compute", Use::kSpeed},
    Option{"hccl_sub_comm_config", Use::kMissing}, Option{"host_env_cpu", Use::kMissing},
    Option{"host_env_os", Use::kMissing}, Option{"input_hint_shape", Use::kMissing},
    Option{"is_input_adjust_hw_layout", Use::kMissing}, Option{"is_output_adjust_hw_layout", Use::kMissing},
    Option{"jit_compile", Use::kSpeed}, Option{"keep_dtype", Use::kMissing}, Option{"mdl_bank_path", Use::kSpeed},
    Option{"modify_mixlist", Use::kMissing}, Option{"multi_stream_parallel_mode", Use::kSpeed},
    Option{"oo_constant_folding", Use::kSpeed}, Option{"oo_dead_code_elimination", Use::kSpeed},
    Option{"oo_level", Use::kSpeed}, Option{"op_bank_path", Use::kSpeed}, Option{"op_compiler_cache_dir", Use::kSpeed},
    Option{"op_compiler_cache_mode", Use::kSpeed}, Option{"op_debug_config", Use::kSpeed},
    Option{"op_debug_level", Use::kSpeed}, Option{"op_name_map", Use::kMissing}, Option{"op_precision_mode", Use::kMissing},
    Option{"optimization_switch", Use::kSpeed}, Option{"quant_dumpable", Use::kSpeed},
    Option{"raw_ge_options", Use::kMissing}, Option{"raw_ge_options_ignore_unsupported", Use::kMissing},
    Option{"save_original_model", Use::kSpeed}, Option{"shape_generalized_build_mode", Use::kSpeed},
    Option{"singleop", Use::kMissing}, Option{"sparsity", Use::kMissing}, Option{"static_model_ops_lower_limit", Use::kSpeed},
    Option{"status_check", Use::kMissing}, Option{"tiling_schedule_optimize", Use::kSpeed},
    Option{"topo_sorting_mode", Use::kSpeed}, Option{"virtual_type", Use::kSpeed},
};

const Option* find(const std::string& name) {
    for (const Option& option : kOptions) {
        if (name == option.name) return &option;
    }
    return nullptr;
}

[[noreturn]] void refuse(const std::string& text) { throw Refusal("", text); }

}  // namespace

CommandLine::CommandLine(int count, char** arguments) {
    for (int i = 0; i < count; ++i) whole_ += (i == 0 ? "" : " ") + std::string(arguments[i]);
    for (int i = 1; i < count; ++i) {
        const std::string argument = arguments[i];
        if (!argument.starts_with("-")) refuse("Non-option parameter: " + argument);
        const size_t equals = argument.find('=');
        const std::string name = argument.substr(0, equals).substr(argument.starts_with("--") ? 2 : 1);
        if (find(name) == nullptr) refuse("unknown command line flag '" + name + "'");
        if (name == "help" || name == "h") {
            add(name, "true");
        } else if (equals != std::string::npos) {
            add(name, argument.substr(equals + 1));
        } else if (i + 1 < count) {
            add(name, arguments[++i]);
        } else {
            refuse("flag '" + argument + "' is missing its argument");
        }
    }
}

void CommandLine::add(const std::string& name, const std::string& value) {
    if (find(name)->use == Use::kMissing) {
        throw Refusal("E10055", "The operation is not supported. Reason: the emulator's atc does not have --" + name + ".");
    }
    values_[name] = value;
}

std::string CommandLine::text(const std::string& name, const std::string& otherwise) const {
    const auto found = values_.find(name);
    return found == values_.end() ? otherwise : found->second;
}

int64_t CommandLine::number(const std::string& name, int64_t otherwise) const {
    if (!has(name)) return otherwise;
    const std::string value = text(name);
    if (!value.empty() && value.size() < 10 && value.find_first_not_of("0123456789") == std::string::npos) {
        return std::stoll(value);
    }
    throw Refusal("E10001", "Value " + value + " for parameter --" + name + " is invalid. Reason: It is not a digit.");
}

std::string help_of_options() {
    std::string text;
    for (const Option& option : kOptions) {
        if (option.use != Use::kHeeded) continue;
        std::string name = "  --" + std::string(option.name);
        name.resize(std::max<size_t>(name.size() + 1, 28), ' ');
        text += name + option.help + "\n";
    }
    text += "Accepted, and no difference on the emulator:";
    for (const Option& option : kOptions) {
        if (option.use == Use::kSpeed) text += " --" + std::string(option.name);
    }
    return text + "\n";
}

}  // namespace cann::offline
