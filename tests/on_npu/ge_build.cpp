// What a program does that builds an offline model with GE's interface: parse, initialise, build, save. Argument 1 is the
// ONNX file, 2 the path without .om, further ones are options of the build as key=value. Prints the name of what failed.
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <string>

namespace ge {
class AscendString {
public:
    AscendString(const char* text);
    bool operator<(const AscendString& other) const;

private:
    std::shared_ptr<std::string> text_;
};
class Graph {
public:
    explicit Graph(const char* name);

private:
    std::shared_ptr<void> implementation_;
};
struct ModelBufferData {
    std::shared_ptr<uint8_t> data;
    uint64_t length;
};
using Options = std::map<AscendString, AscendString>;
uint32_t aclgrphParseONNX(const char* path, const Options& options, Graph& graph);
uint32_t aclgrphBuildInitialize(Options& options);
uint32_t aclgrphBuildModel(const Graph& graph, const Options& options, ModelBufferData& model);
uint32_t aclgrphSaveModel(const char* path, const ModelBufferData& model);
void aclgrphBuildFinalize();
}  // namespace ge
extern "C" const char* aclGetRecentErrMsg();

static int failed(const char* what) {
    const char* message = aclGetRecentErrMsg();
    std::printf("%s: %s\n", what, message ? message : "");
    return 1;
}

int main(int count, char** arguments) {
    ge::Graph graph("model");
    ge::ModelBufferData model;
    ge::Options process, options;
    for (int i = 3; i < count; ++i) {
        const std::string option = arguments[i];
        const size_t equals = option.find('=');
        options.emplace(option.substr(0, equals).c_str(), option.substr(equals + 1).c_str());
    }
    if (ge::aclgrphParseONNX(arguments[1], {}, graph) != 0) return failed("parse");
    if (ge::aclgrphBuildModel(graph, options, model) == 0) return failed("building before the start");
    if (ge::aclgrphBuildInitialize(process) != 0) return failed("initialize");
    if (ge::aclgrphBuildModel(graph, options, model) != 0) return failed("build");
    if (ge::aclgrphSaveModel(arguments[2], model) != 0) return failed("save");
    ge::aclgrphBuildFinalize();
    return 0;
}
