// What every operator has in common: description, placement check, execution on its stream, trace.
#include <ATen/core/LegacyTypeDispatch.h>

#include <chrono>
#include <sstream>

#include "runtime/memory.h"
#include "ops/operator.h"
#include "races/check.h"
#include "runtime/stream.h"
#include "runtime/trace.h"

namespace cann {
namespace {

constexpr int kInnerError = 561000;  // aclnn's class of internal errors
constexpr int kInvalidParameter = 161002;

// An address that is no memory within this chip's reach would be a fault of the chip; here it ends as an error.
std::string misplaced(const Call& call, int32_t device) {
    for (const Argument& argument : call.arguments) {
        for (const auto& tensor : argument.tensors) {
            if (tensor->bytes() == 0) continue;
            const Region region = find_region(tensor->begin());
            if (!region || !reaches(device, region.device)) {
                return call.title() + ": " + argument.name + " is not in the memory of device " + std::to_string(device);
            }
        }
    }
    return "";
}

int64_t product(const std::vector<int64_t>& sizes) { return c10::multiply_integers(sizes); }

// Multiplications and additions of the matrix unit; 0 for other operators, which the memory bounds.
int64_t count_flops(const Call& call) {
    const std::string name = call.operator_name;
    const auto last = [](const TensorArgument* tensor, int from_end) {
        return tensor->sizes[tensor->sizes.size() - from_end];
    };
    if (name.find("Attention") != std::string::npos) {
        const auto* query = call.tensor("query");
        const auto* key = call.tensor(call.find("key0") ? "key0" : "key");  // a list in a graph's fused inference
        if (query == nullptr || key == nullptr || product(query->sizes) == 0) return 0;
        const auto* layout = call.find(call.graph ? "input_layout" : "inputLayout");
        const bool sequence_is_second = layout && layout->value.rfind("BS", 0) == 0;
        const int64_t keys = sequence_is_second ? key->sizes[1] : last(key, 2);
        const bool way_back = name.find("Grad") != std::string::npos;  // five products for two, the scores' once more
        return (way_back ? 10 : 4) * product(query->sizes) * keys;
    }
    if (name == "ConvolutionBackward") {
        const auto* weight = call.tensor("weight");
        const auto* dense = call.tensor(call.number("transposed", 0) != 0 ? "input" : "gradOutput");
        const int64_t products = (call.tensor("gradInput") != nullptr) + (call.tensor("gradWeight") != nullptr);
        return 2 * products * product(dense->sizes) * (product(weight->sizes) / std::max<int64_t>(weight->sizes[0], 1));
    }
    if (name == "Convolution") {
        const auto* weight = call.tensor("weight");
        const bool transposed = call.number("transposed", 0) != 0;
        const auto* dense = call.tensor(transposed ? "input" : "output");
        return weight == nullptr || weight->sizes[0] == 0 ? 0 : 2 * product(dense->sizes) * (product(weight->sizes) / weight->sizes[0]);
    }
    if (call.graph != nullptr && name == "Conv2D") {
        const auto *filter = call.tensor("filter"), *out = call.tensor("y");
        return 2 * product(out->sizes) * (product(filter->sizes) / std::max<int64_t>(filter->sizes[0], 1));
    }
    if (call.graph != nullptr && name.find("MatMul") != std::string::npos) {
        const bool transposed = call.number("transpose_x1", call.number("adj_x1", 0)) != 0;
        return 2 * product(call.tensor("y")->sizes) * last(call.tensor("x1"), transposed ? 2 : 1);
    }
    if (name.rfind("WeightQuantBatchMatmul", 0) == 0) {
        return 2 * product(call.tensor("y")->sizes) * last(call.tensor("x"), call.number("transpose_x", 0) != 0 ? 2 : 1);
    }
    if (name.rfind("GroupedMatmul", 0) == 0) {  // each row meets one weight, whatever its group
        const auto* x = call.tensor(call.graph ? "x0" : "x");
        const auto* out = call.tensor(call.graph ? "y0" : "out");
        return x == nullptr || out == nullptr ? 0 : 2 * product(out->sizes) * last(x, 1);
    }
    for (const char* left : {"mat1", "batch1", "self"}) {
        const auto* matrix = call.tensor(left);
        const auto* out = call.tensor("out") ? call.tensor("out") : call.tensor("self");
        const bool multiplies = call.find("mat2") || call.find("batch2") || call.find("vec");
        if (multiplies && matrix != nullptr && !matrix->sizes.empty()) return 2 * product(out->sizes) * last(matrix, 1);
    }
    return 0;
}

std::string quoted(const std::string& text) {
    std::string escaped = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') escaped += '\\';
        escaped += c;
    }
    return escaped + "\"";
}

std::string trace_line(const Call& call, const Stream& stream, double microseconds) {
    std::ostringstream tensors, attributes;
    size_t bytes = 0;
    const char *tensor_comma = "", *attribute_comma = "";
    for (const Argument& argument : call.arguments) {
        for (const auto& tensor : argument.tensors) {
            bytes += tensor->bytes();
            tensors << tensor_comma << "{\"name\":" << quoted(argument.name) << ",\"shape\":[" << to_text(tensor->sizes)
                    << "],\"dtype\":\"" << dtype_name(tensor->dtype) << "\",\"format\":\"" << format_name(tensor->format)
                    << "\"}";
            tensor_comma = ",";
        }
        if (argument.value.empty()) continue;
        attributes << attribute_comma << quoted(argument.name) << ":" << quoted(argument.value);
        attribute_comma = ",";
    }
    std::ostringstream line;
    line << "{\"event\":\"launch\",\"operator\":\"" << call.operator_name << "\",\"tensors\":[" << tensors.str()
         << "],\"attributes\":{" << attributes.str() << "},\"bytes\":" << bytes << ",\"flops\":" << count_flops(call)
         << ",\"microseconds\":" << microseconds << ",\"device\":" << stream.device << ",\"stream\":" << stream.id;
    if (call.graph != nullptr) line << ",\"graph\":" << quoted(call.graph);
    line << "}";
    return line.str();
}

}  // namespace

int run_now(const Executor& executor, const Stream& stream) {
    const std::string reason = misplaced(executor.call, stream.device);
    if (!reason.empty()) return fail_launch(kInvalidParameter, reason);
    const auto start = std::chrono::steady_clock::now();
    try {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        executor.run();
    } catch (const Failure& failure) {
        return fail_launch(failure.code, failure.what());
    } catch (const c10::Error& error) {
        return fail_launch(kInnerError, executor.call.title() + ": " + error.what_without_backtrace());
    } catch (const std::exception& error) {
        return fail_launch(kInnerError, executor.call.title() + ": " + error.what());
    }
    if (trace::enabled()) {
        const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;
        trace::write(trace_line(executor.call, stream, taken.count()));
    }
    return ACL_SUCCESS;
}

std::string Call::title() const {
    const bool whole = std::string_view(operator_name).starts_with("Hccl");
    if (graph == nullptr) return (whole ? "" : "aclnn") + std::string(operator_name);
    return *operator_name == '\0' ? graph : std::string(operator_name) + " in " + graph;
}

const Argument* Call::find(std::string_view name) const {
    for (const Argument& argument : arguments) {
        if (argument.name == name) return &argument;
    }
    return nullptr;
}

const TensorArgument* Call::tensor(std::string_view name) const {
    const Argument* argument = find(name);
    return argument == nullptr || argument->tensors.empty() ? nullptr : argument->tensors[0].get();
}

int64_t Call::number(std::string_view name, int64_t otherwise) const {
    const Argument* argument = find(name);
    return argument == nullptr || argument->value.empty() ? otherwise : std::stoll(argument->value);
}

void Resizable::set(const Tensor& value) const {
    Tensor whole = at::from_blob(argument->data, {static_cast<int64_t>(argument->bytes() / c10::elementSize(argument->dtype))},
                                 argument->dtype);
    TORCH_CHECK(value.numel() <= whole.numel(), "the output has ", whole.numel(), " elements for ", value.numel());
    whole.narrow(0, 0, value.numel()).copy_(value.flatten());
    argument->sizes = value.sizes().vec();
}

std::string to_text(at::IntArrayRef values) {
    std::string text;
    for (int64_t value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
    return text;
}

std::string to_text(const at::Scalar& value) {
    std::ostringstream text;
    text << value;
    return text.str();
}

// The names in "(Tensor self, Scalar alpha) { ... }".
std::vector<std::string> parameter_names(const char* declaration) {
    std::vector<std::string> names;
    std::string word, last;
    for (const char* c = declaration + 1; ; ++c) {
        if (std::isalnum(static_cast<unsigned char>(*c)) || *c == '_') {
            word += *c;
            continue;
        }
        if (!word.empty()) last = word;
        word.clear();
        if (*c == ',' || *c == ')') names.push_back(last);
        if (*c == ')' || *c == '\0') return names;
    }
}

int fail_plan(const char* operator_name, const std::exception& error) {
    return fail(kInvalidParameter, "aclnn%s: %s", operator_name, error.what());
}

int launch(Executor* planned, aclrtStream handle) {
    std::shared_ptr<Executor> executor(planned);
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return fail(ACL_ERROR_INVALID_RESOURCE_HANDLE, "stream %p does not exist", handle);
    if (const aclError error = fault()) return error;
    races::launch(*stream, executor->call);
    return stream->launch([executor, stream] { return run_now(*executor, *stream); });
}

}  // namespace cann
