// GE's interface to ONNX models and offline models: ge_ir_build.h and onnx_parser.h of hicann/ge.

#include <fstream>
#include <mutex>

#include "graph/ge_api.h"
#include "offline/build.h"
#include "offline/files.h"
#include "offline/onnx.h"
#include "runtime/runtime.h"

#pragma GCC visibility push(default)
namespace ge {

struct ModelBufferData {
    std::shared_ptr<uint8_t> data;
    uint64_t length;
};

Status aclgrphParseONNX(const char* path, const Options& options, Graph& graph);
Status aclgrphParseONNXFromMem(const char* model, size_t size, const Options& options, Graph& graph);
Status aclgrphBuildInitialize(Options& options);
Status aclgrphBuildModel(const Graph& graph, const Options& options, ModelBufferData& model);
Status aclgrphSaveModel(const char* path, const ModelBufferData& model);
void aclgrphBuildFinalize();

}  // namespace ge
#pragma GCC visibility pop

namespace ge {
namespace {

using cann::offline::BuildOptions;
using cann::offline::Refusal;

std::mutex guard;
bool initialised = false;
BuildOptions global_options;

template <class Work>
Status guarded(const char* what, Work work) {
    try {
        work();
        return SUCCESS;
    } catch (const Refusal& refusal) {
        cann::fail(ACL_ERROR_GE_FAILURE, "%s: %s: %s", what, refusal.code.c_str(), refusal.what());
    } catch (const std::exception& error) {
        cann::fail(ACL_ERROR_GE_FAILURE, "%s: E19999: %s", what, error.what());
    }
    return FAILED;
}

// What the keys of ge_api_types.h are to a build; those that only change how fast a chip is do nothing.
std::string* find_option(BuildOptions& options, const std::string& key) {
    thread_local std::string ignored;
    const std::map<std::string, std::string*> options_of{
        {"ge.socVersion", &options.soc_version},
        {"ge.exec.precision_mode", &options.precision_mode},
        {"ge.exec.precision_mode_v2", &options.precision_mode_v2},
        {"input_shape", &options.shapes.input_shape},
        {"input_format", &options.shapes.input_format},
        {"ge.dynamicBatchSize", &options.shapes.dynamic_batch_size},
        {"ge.dynamicImageSize", &options.shapes.dynamic_image_size},
        {"ge.dynamicDims", &options.shapes.dynamic_dims},
        {"ge.insertOpFile", &options.insert_op_conf},
        {"ge.outputDatatype", &options.output_type},
        {"ge.outputNodes", &options.out_nodes},
        {"ge.opSelectImplmode", &ignored},
        {"ge.optypelistForImplmode", &ignored},
        {"ge.exec.disableReuseMemory", &ignored},
    };
    const auto found = options_of.find(key);
    return found == options_of.end() ? nullptr : found->second;
}

void read(BuildOptions& into, const Options& options) {
    for (const auto& [key, value] : options) {
        std::string* option = find_option(into, key.GetString());
        if (option == nullptr) {
            throw Refusal("E10001", "Value " + std::string(value.GetString()) + " for parameter " + key.GetString() +
                          " is invalid. Reason: the option is not emulated.");
        }
        *option = value.GetString();
    }
}

void require_none(const Options& options) {
    if (options.empty()) return;
    throw Refusal("E10001", "Value " + std::string(options.begin()->second.GetString()) + " for parameter " +
                  options.begin()->first.GetString() + " is invalid. Reason: the parser's options are not emulated.");
}

}  // namespace

Status aclgrphParseONNX(const char* path, const Options& options, Graph& graph) {
    return guarded("aclgrphParseONNX", [&] {
        require_none(options);
        const cann::offline::MappedFile file(path);
        const std::string directory = std::string(path).substr(0, std::string(path).rfind('/') + 1);
        graph.content = std::make_shared<cann::graph::Graph>(
            cann::offline::parse_onnx(file.content(), directory.empty() ? "." : directory));
    });
}

Status aclgrphParseONNXFromMem(const char* model, size_t size, const Options& options, Graph& graph) {
    return guarded("aclgrphParseONNXFromMem", [&] {
        require_none(options);
        graph.content = std::make_shared<cann::graph::Graph>(cann::offline::parse_onnx({model, size}, ""));
    });
}

Status aclgrphBuildInitialize(Options& options) {
    return guarded("aclgrphBuildInitialize", [&] {
        std::lock_guard<std::mutex> lock(guard);
        BuildOptions given;
        given.soc_version = cann::chip().soc;
        read(given, options);
        global_options = std::move(given);
        initialised = true;
    });
}

Status aclgrphBuildModel(const Graph& graph, const Options& options, ModelBufferData& model) {
    return guarded("aclgrphBuildModel", [&] {
        BuildOptions all;
        {
            std::lock_guard<std::mutex> lock(guard);
            if (!initialised) throw std::runtime_error("call aclgrphBuildInitialize first");
            all = global_options;
        }
        read(all, options);
        all.command_line = "aclgrphBuildModel";
        const std::string name = graph.content->name.empty() ? "graph" : graph.content->name;
        cann::offline::OfflineModel built = cann::offline::build(*graph.content, name, all);
        auto bytes = std::make_shared<std::string>(cann::offline::serialize(built));
        model.length = bytes->size();
        model.data = {bytes, reinterpret_cast<uint8_t*>(bytes->data())};
    });
}

Status aclgrphSaveModel(const char* path, const ModelBufferData& model) {
    return guarded("aclgrphSaveModel", [&] {
        if (model.data == nullptr) throw std::runtime_error("the model is empty");
        const std::string file = std::string(path).ends_with(".om") ? path : std::string(path) + ".om";
        cann::offline::write_whole(file, {reinterpret_cast<const char*>(model.data.get()), model.length});
    });
}

void aclgrphBuildFinalize() {
    std::lock_guard<std::mutex> lock(guard);
    initialised = false;
    global_options = {};
}

}  // namespace ge
