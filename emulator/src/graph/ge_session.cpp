// GE's session: graphs are added, compiled, given memory, and run on a stream.
#include <mutex>

#include "graph/ge_api.h"
#include "graph/runner.h"
#include "graph/hf32.h"
#include "runtime/memory.h"
#include "runtime/stream.h"
#include "runtime/trace.h"

namespace cann::graph {
namespace {
bool convolutions_in_hf32 = true, products_in_hf32 = false;  // as torch_npu has it by default
}

bool allows_hf32(Unit unit) { return unit == Unit::kConvolution ? convolutions_in_hf32 : products_in_hf32; }

void set_hf32(const char* digits) {
    convolutions_in_hf32 = digits[0] == '1';
    products_in_hf32 = digits[0] != '\0' && digits[1] == '1';
}
}  // namespace cann::graph

namespace ge {
namespace {

// Device memory that torchair's allocator returns nothing for: a graph without constants still asks for some.
constexpr size_t kLeastBytes = 512;

struct Loaded {
    std::string name;
    std::shared_ptr<const cann::graph::Graph> graph;
    std::shared_ptr<const cann::graph::Compiled> compiled;
    std::shared_ptr<CompiledGraphSummary> summary;
    cann::graph::Memory memory;
    bool constants_loaded = false;
};

std::mutex guard;
std::map<uint32_t, Loaded> graphs;  // torchair has one session a process, and numbers its graphs
std::string last_error;

Status fail(const std::string& reason) {
    std::lock_guard<std::mutex> lock(guard);
    last_error = reason;
    cann::fail(ACL_ERROR_GE_FAILURE, "%s", reason.c_str());
    return FAILED;
}

Loaded* find(uint32_t id) {
    std::lock_guard<std::mutex> lock(guard);
    const auto found = graphs.find(id);
    return found == graphs.end() ? nullptr : &found->second;
}

Status unknown(uint32_t id) { return fail("there is no graph " + std::to_string(id)); }

std::shared_ptr<CompiledGraphSummary> summarise(const cann::graph::Compiled& compiled) {
    auto summary = std::make_shared<CompiledGraphSummary>();
    summary->constant_bytes = std::max(compiled.constant_bytes, kLeastBytes);
    summary->feature_bytes = std::max(compiled.feature_bytes, kLeastBytes);
    for (int output : compiled.outputs) {
        summary->shapes.emplace_back(compiled.values[output].sizes);
        summary->dtypes.push_back(static_cast<DataType>(cann::to_acl(compiled.values[output].dtype)));
    }
    return summary;
}

// What a tensor of torchair is: its sizes, the format in which it is stored, and where.
cann::TensorArgument argument_of(const Tensor& tensor) {
    const Description& description = tensor.content->description;
    const bool is_private = cann::is_private(description.format);
    cann::TensorArgument argument;
    argument.dtype = cann::from_acl(static_cast<aclDataType>(description.dtype));
    argument.sizes = is_private ? description.origin_sizes : description.sizes;
    argument.strides.resize(argument.sizes.size());
    int64_t stride = 1;
    for (size_t i = argument.sizes.size(); i-- > 0; stride *= argument.sizes[i]) argument.strides[i] = stride;
    argument.offset = 0;
    argument.format = static_cast<aclFormat>(description.format);
    argument.storage_sizes = description.sizes;
    argument.data = reinterpret_cast<char*>(tensor.content->data);
    return argument;
}

}  // namespace

bool CompiledGraphSummary::IsStatic() const { return true; }
Status CompiledGraphSummary::GetConstMemorySize(size_t& size) const {
    size = constant_bytes;
    return SUCCESS;
}
Status CompiledGraphSummary::GetFeatureMemorySize(size_t& size) const {
    size = feature_bytes;
    return SUCCESS;
}
Status CompiledGraphSummary::GetFixedFeatureMemorySize(size_t& size) const {
    size = 0;
    return SUCCESS;
}
// Every run may have its features elsewhere, so that torch's allocator has the memory between the runs.
Status CompiledGraphSummary::GetFeatureMemoryBaseRefreshable(bool& refreshable) const {
    refreshable = true;
    return SUCCESS;
}
Status CompiledGraphSummary::GetOutputShapes(std::vector<Shape>& all) const {
    all = shapes;
    return SUCCESS;
}
Status CompiledGraphSummary::GetOutputDtypes(std::vector<DataType>& all) const {
    all = dtypes;
    return SUCCESS;
}

Status GEInitialize(const Options& options) {
    const auto hf32 = options.find("ge.exec.allow_hf32");
    if (hf32 != options.end()) cann::graph::set_hf32(hf32->second.GetString());
    return SUCCESS;
}
Status GEFinalize() { return SUCCESS; }
AscendString GEGetWarningMsgV2() { return AscendString(""); }

Session::Session(const Options&) : id_(0) {}

Session::~Session() {
    std::lock_guard<std::mutex> lock(guard);
    graphs.clear();
}

Status Session::AddGraph(uint32_t id, const Graph& graph, const Options&) {
    std::lock_guard<std::mutex> lock(guard);
    // torchair calls all its graphs alike in different processes; within one the number tells them apart.
    graphs[id] = {graph.content->name, graph.content, nullptr, nullptr, {}, false};
    return SUCCESS;
}

Status Session::RemoveGraph(uint32_t id) {
    std::lock_guard<std::mutex> lock(guard);
    return graphs.erase(id) == 1 ? SUCCESS : FAILED;
}

Status Session::CompileGraph(uint32_t id) {
    Loaded* loaded = find(id);
    if (loaded == nullptr) return unknown(id);
    try {
        auto compiled = std::make_shared<cann::graph::Compiled>(cann::graph::compile(loaded->graph));
        loaded->summary = summarise(*compiled);
        if (cann::trace::enabled()) cann::trace::write(cann::graph::trace_line(*compiled));
        loaded->compiled = std::move(compiled);
        return SUCCESS;
    } catch (const std::exception& error) {
        return fail(loaded->name + " cannot be compiled: " + error.what());
    }
}

std::shared_ptr<CompiledGraphSummary> Session::GetCompiledGraphSummary(uint32_t id) {
    Loaded* loaded = find(id);
    return loaded == nullptr ? nullptr : loaded->summary;
}

Status Session::SetGraphConstMemoryBase(uint32_t id, const void* memory, size_t size) {
    Loaded* loaded = find(id);
    if (loaded == nullptr || loaded->compiled == nullptr) return unknown(id);
    if (size < loaded->compiled->constant_bytes) return fail("the memory for constants is too small");
    loaded->memory.constants = static_cast<char*>(const_cast<void*>(memory));
    loaded->constants_loaded = false;
    return SUCCESS;
}

Status Session::UpdateGraphFeatureMemoryBase(uint32_t id, const void* memory, size_t size) {
    Loaded* loaded = find(id);
    if (loaded == nullptr || loaded->compiled == nullptr) return unknown(id);
    if (size < loaded->compiled->feature_bytes) return fail("the memory for features is too small");
    loaded->memory.features = static_cast<char*>(const_cast<void*>(memory));
    return SUCCESS;
}

Status Session::UpdateGraphRefreshableFeatureMemoryBase(uint32_t id, const void* memory, size_t size) {
    return UpdateGraphFeatureMemoryBase(id, memory, size);
}

// No part of the features is fixed, so there is nothing to place.
Status Session::SetGraphFixedFeatureMemoryBase(uint32_t, const void*, size_t) { return SUCCESS; }

// torchair's allocator serves graphs of dynamic shapes; others get their memory by the functions above.
Status Session::RegisterExternalAllocator(const void*, std::shared_ptr<Allocator>) const { return SUCCESS; }

Status Session::RunGraphWithStreamAsync(uint32_t id, void* handle, const std::vector<Tensor>& inputs,
                                        std::vector<Tensor>& outputs) {
    Loaded* loaded = find(id);
    if (loaded == nullptr || loaded->compiled == nullptr) return unknown(id);
    cann::Stream* stream = cann::find_stream(handle);
    if (stream == nullptr) return fail("the stream does not exist");
    if (cann::fault() != 0) return fail(cann::recent_message());
    cann::graph::Memory memory = loaded->memory;
    for (const Tensor& input : inputs) {
        const char* data = reinterpret_cast<const char*>(input.GetData());
        const bool on_host = input.GetPlacement() == kHost;
        if (on_host) memory.from_host[static_cast<int>(memory.inputs.size())].assign(data, data + input.content->size);
        memory.inputs.push_back(argument_of(input));
    }
    for (const Tensor& output : outputs) memory.outputs.push_back(argument_of(output));
    if (memory.outputs.size() != loaded->compiled->outputs.size()) return fail("the number of outputs is wrong");
    const bool load = !std::exchange(loaded->constants_loaded, true);
    cann::graph::check_races(*loaded->compiled, memory, *stream, load);
    const int code = stream->launch([compiled = loaded->compiled, memory, load, stream] {
        if (load) cann::graph::load_constants(*compiled, memory.constants);
        return cann::graph::run(*compiled, memory, *stream);
    });
    return code == 0 ? SUCCESS : fail(cann::recent_message());
}

Status Session::RunGraph(uint32_t id, const std::vector<Tensor>& inputs, std::vector<Tensor>& outputs) {
    const Status status = RunGraphWithStreamAsync(id, nullptr, inputs, outputs);
    if (cann::Stream* stream = cann::find_stream(nullptr)) stream->synchronize();
    return status;
}

}  // namespace ge

// For error_text.cpp: valid until this thread asks again.
extern "C" const char* cann_emulator_graph_error() {
    static thread_local std::string text;
    std::lock_guard<std::mutex> lock(ge::guard);
    text = ge::last_error;
    return text.c_str();
}
