// The old operator interface (aclop*). torch_npu falls back to it silently when an aclnn symbol is missing, so its
// descriptors work, and executing an operator that nobody emulates fails and names the operator.
#include <map>
#include <sstream>
#include <vector>

#include <c10/util/strides.h>

#include "operator.h"
#include "settings.h"

struct aclDataBuffer {
    void* data;
    size_t size;
};

struct aclTensorDesc {
    aclDataType type;
    aclFormat format;
    std::vector<int64_t> dims;
    std::vector<int64_t> storage_dims;
    aclFormat storage_format;
    aclMemType placement = ACL_MEMTYPE_DEVICE;
    std::string name;
};

struct aclopAttr {
    std::map<std::string, std::string> values;
};

using namespace cann;

CANN_API aclDataBuffer* aclCreateDataBuffer(void* data, size_t size) { return new aclDataBuffer{data, size}; }

CANN_API aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
    delete buffer;
    return ACL_SUCCESS;
}

CANN_API aclTensorDesc* aclCreateTensorDesc(aclDataType type, int count, const int64_t* dims, aclFormat format) {
    std::vector<int64_t> shape(dims, dims + count);
    return new aclTensorDesc{type, format, shape, shape, format, ACL_MEMTYPE_DEVICE, ""};
}

CANN_API void aclDestroyTensorDesc(const aclTensorDesc* desc) { delete desc; }
CANN_API aclDataType aclGetTensorDescType(const aclTensorDesc* desc) { return desc->type; }
CANN_API aclFormat aclGetTensorDescFormat(const aclTensorDesc* desc) { return desc->format; }
CANN_API size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) { return desc->dims.size(); }

CANN_API aclError aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* size) {
    if (index >= desc->dims.size()) return fail(ACL_ERROR_INVALID_PARAM, "tensor has no dimension %zu", index);
    *size = desc->dims[index];
    return ACL_SUCCESS;
}

CANN_API void aclSetTensorDescName(aclTensorDesc* desc, const char* name) { desc->name = name ? name : ""; }

CANN_API aclError aclSetTensorFormat(aclTensorDesc* desc, aclFormat format) {
    desc->storage_format = format;
    return ACL_SUCCESS;
}

CANN_API aclError aclSetTensorShape(aclTensorDesc* desc, int count, const int64_t* dims) {
    desc->storage_dims.assign(dims, dims + count);
    return ACL_SUCCESS;
}

CANN_API aclError aclSetTensorPlaceMent(aclTensorDesc* desc, aclMemType placement) {
    desc->placement = placement;
    return ACL_SUCCESS;
}

CANN_API aclopAttr* aclopCreateAttr() { return new aclopAttr; }
CANN_API void aclopDestroyAttr(const aclopAttr* attr) { delete attr; }

namespace {

template <class T>
std::string text_of(T value) {
    return std::to_string(value);
}
std::string text_of(const char* value) { return value; }

template <class T>
std::string text_of(int count, const T* values) {
    std::string text;
    for (int i = 0; i < count; ++i) text += (i ? "," : "") + std::to_string(values[i]);
    return text;
}
std::string text_of(int count, const int* lengths, const int64_t* const* lists) {
    std::string text;
    for (int i = 0; i < count; ++i) text += (i ? ";" : "") + text_of(lengths[i], lists[i]);
    return text;
}

template <class... V>
aclError set_attribute(aclopAttr* attributes, const char* name, V... value) {
    attributes->values[name] = text_of(value...);
    return ACL_SUCCESS;
}

}  // namespace

CANN_API aclError aclopSetAttrBool(aclopAttr* to, const char* name, uint8_t v) { return set_attribute(to, name, v); }
CANN_API aclError aclopSetAttrDataType(aclopAttr* to, const char* name, aclDataType v) {
    return set_attribute(to, name, static_cast<int>(v));
}
CANN_API aclError aclopSetAttrFloat(aclopAttr* to, const char* name, float v) { return set_attribute(to, name, v); }
CANN_API aclError aclopSetAttrInt(aclopAttr* to, const char* name, int64_t v) { return set_attribute(to, name, v); }
CANN_API aclError aclopSetAttrString(aclopAttr* to, const char* name, const char* v) { return set_attribute(to, name, v); }
CANN_API aclError aclopSetAttrListBool(aclopAttr* to, const char* name, int count, const uint8_t* v) {
    return set_attribute(to, name, count, v);
}
CANN_API aclError aclopSetAttrListFloat(aclopAttr* to, const char* name, int count, const float* v) {
    return set_attribute(to, name, count, v);
}
CANN_API aclError aclopSetAttrListInt(aclopAttr* to, const char* name, int count, const int64_t* v) {
    return set_attribute(to, name, count, v);
}
CANN_API aclError aclopSetAttrListListInt(aclopAttr* to, const char* name, int count, const int* lengths,
                                          const int64_t* const* v) {
    return set_attribute(to, name, count, lengths, v);
}

namespace {

using Operands = std::vector<std::shared_ptr<TensorArgument>>;
using Kernel = void (*)(const Operands& inputs, const Operands& outputs, const aclopAttr& attributes);

// An input in host memory: small, and gone after the call.
struct HostOperand : TensorArgument {
    explicit HostOperand(const aclDataBuffer& buffer)
        : copy(static_cast<char*>(buffer.data), static_cast<char*>(buffer.data) + buffer.size) {
        data = copy.data();
    }

    std::vector<char> copy;
};

// torch_npu describes what it stores (sizes and format) and what that means (storage_dims of a private format).
std::shared_ptr<TensorArgument> describe(const aclTensorDesc& desc, const aclDataBuffer& buffer) {
    const bool stored = is_private(desc.storage_format);
    std::shared_ptr<TensorArgument> argument;
    if (desc.placement == ACL_MEMTYPE_DEVICE) {
        argument = std::make_shared<TensorArgument>();
        argument->data = static_cast<char*>(buffer.data);
    } else {
        argument = std::make_shared<HostOperand>(buffer);
    }
    argument->dtype = from_acl(desc.type);
    argument->sizes = desc.dims;
    const auto strides = c10::contiguous_strides(desc.dims);
    argument->strides.assign(strides.begin(), strides.end());
    argument->offset = 0;
    argument->format = stored ? desc.storage_format : desc.format;
    argument->storage_sizes = desc.storage_dims;
    return argument;
}

void identity(const Operands& inputs, const Operands& outputs, const aclopAttr&) { recast(*inputs.at(0), *outputs.at(0)); }

// The first of eight floats says whether a result overflowed. The operator writes into what it is given.
void get_float_status(const Operands& inputs, const Operands& outputs, const aclopAttr&) {
    for (const Operands& tensors : {inputs, outputs}) {
        if (!tensors.empty()) tensors[0]->read().fill_(overflowed ? 1 : 0);
    }
}
void clear_float_status(const Operands&, const Operands& outputs, const aclopAttr&) {
    overflowed = false;
    if (!outputs.empty()) outputs[0]->read().zero_();
}
void alloc_float_status(const Operands&, const Operands& outputs, const aclopAttr&) { outputs.at(0)->read().zero_(); }

// Rounds as put() does, also where the output is in a private format: that is when torch_npu comes here.
void put_stored(const TensorArgument& out, const at::Tensor& value) {
    const at::Tensor rounded = at::empty(out.sizes, out.dtype);
    put(rounded, value);
    store(rounded, out);
}

void cast(const Operands& inputs, const Operands& outputs, const aclopAttr&) {
    put_stored(*outputs.at(0), inputs.at(0)->read());
}

void less_equal(const Operands& inputs, const Operands& outputs, const aclopAttr&) {
    put_stored(*outputs.at(0), at::le(inputs.at(0)->read(), inputs.at(1)->read()));
}

void swish(const Operands& inputs, const Operands& outputs, const aclopAttr& attributes) {
    const at::Tensor x = up(inputs.at(0)->read());
    put_stored(*outputs.at(0), x * at::sigmoid(x * std::stod(attributes.values.at("scale"))));
}

void fast_gelu(const Operands& inputs, const Operands& outputs, const aclopAttr&) {
    const at::Tensor x = up(inputs.at(0)->read());
    put_stored(*outputs.at(0), x * at::sigmoid(x * 1.702));
}

std::vector<int64_t> whole_numbers(const TensorArgument& input) {
    const at::Tensor values = input.read().to(at::kLong).contiguous();
    return {values.data_ptr<int64_t>(), values.data_ptr<int64_t>() + values.numel()};
}

void transpose(const Operands& inputs, const Operands& outputs, const aclopAttr&) {
    store(inputs.at(0)->read().permute(whole_numbers(*inputs.at(1))), *outputs.at(0));
}

std::vector<int64_t> whole_numbers(const std::string& text) {
    std::vector<int64_t> values;
    std::istringstream items(text);
    for (std::string item; std::getline(items, item, ',');) values.push_back(std::stoll(item));
    return values;
}

void confusion_transpose(const Operands& inputs, const Operands& outputs, const aclopAttr& attributes) {
    const auto order = whole_numbers(attributes.values.at("perm")), shape = whole_numbers(attributes.values.at("shape"));
    const at::Tensor x = inputs.at(0)->read();
    const bool transpose_first = attributes.values.at("transpose_first") == "1";
    store(transpose_first ? x.permute(order).reshape(shape) : x.reshape(shape).permute(order), *outputs.at(0));
}

void sort_values(const Operands& inputs, const Operands& outputs, const aclopAttr& attributes) {
    const int64_t dim = std::stoll(attributes.values.at("axis"));
    const bool descending = attributes.values.at("descending") == "1";
    put_stored(*outputs.at(0), std::get<0>(at::sort(inputs.at(0)->read(), dim, descending)));
}

// Normalises from one dimension on; mean and 1 / deviation keep what they were reduced over as dimensions of one.
void layer_norm(const Operands& inputs, const Operands& outputs, const aclopAttr& attributes) {
    const at::Tensor x = up(inputs.at(0)->read());
    const auto shape = x.sizes().slice(std::stoll(attributes.values.at("begin_norm_axis")));
    const double epsilon = std::stod(attributes.values.at("epsilon"));
    const auto [y, mean, rstd] =
        at::native_layer_norm(x, shape, up(inputs.at(1)->read()), up(inputs.at(2)->read()), epsilon);
    size_t index = 0;
    for (const at::Tensor& result : {y, mean, rstd}) put_stored(*outputs.at(index++), result);
}

void slice(const Operands& inputs, const Operands& outputs, const aclopAttr&) {
    const auto starts = whole_numbers(*inputs.at(1)), sizes = whole_numbers(*inputs.at(2));
    at::Tensor part = inputs.at(0)->read();
    for (size_t dim = 0; dim < starts.size(); ++dim) part = part.narrow(dim, starts[dim], sizes[dim]);
    store(part, *outputs.at(0));
}

void strided_slice(const Operands& inputs, const Operands& outputs, const aclopAttr& attributes) {
    for (const auto& [name, value] : attributes.values) TORCH_CHECK(value == "0", "the attribute ", name, " is not emulated");
    const auto starts = whole_numbers(*inputs.at(1)), ends = whole_numbers(*inputs.at(2)), steps = whole_numbers(*inputs.at(3));
    at::Tensor part = inputs.at(0)->read();
    for (size_t dim = 0; dim < starts.size(); ++dim) part = part.slice(dim, starts[dim], ends[dim], steps[dim]);
    store(part, *outputs.at(0));
}

void matmul(const Operands& inputs, const Operands& outputs, const aclopAttr& attributes) {
    constexpr int8_t kAllowLower = 1;
    const auto operand = [&](size_t index, const char* transposed) {
        const auto attribute = attributes.values.find(transposed);
        const at::Tensor matrix = cube(inputs.at(index)->read(), kAllowLower);
        return attribute != attributes.values.end() && attribute->second == "1" ? matrix.transpose(-1, -2) : matrix;
    };
    const at::Tensor product = at::matmul(operand(0, "transpose_x1"), operand(1, "transpose_x2"));
    put_stored(*outputs.at(0), inputs.size() > 2 ? product + up(inputs[2]->read()) : product);
}

void rotary_mul(const Operands& inputs, const Operands& outputs, const aclopAttr&) {
    const at::Tensor x = up(inputs.at(0)->read());
    const auto parts = x.chunk(2, -1);
    const at::Tensor rotated = at::cat({-parts[1], parts[0]}, -1);
    put_stored(*outputs.at(0), x * up(inputs.at(1)->read()) + rotated * up(inputs.at(2)->read()));
}

const std::map<std::string, Kernel> kKernels{
    {"Cast", cast},
    {"ConfusionTransposeD", confusion_transpose},
    {"FastGelu", fast_gelu},
    {"Identity", identity},
    {"LayerNormV3", layer_norm},
    {"LessEqual", less_equal},
    {"MatMul", matmul},
    {"NPUAllocFloatStatus", alloc_float_status},
    {"NPUGetFloatStatus", get_float_status},
    {"NPUGetFloatStatusV2", get_float_status},
    {"NPUClearFloatStatus", clear_float_status},
    {"NPUClearFloatStatusV2", clear_float_status},
    {"RotaryMul", rotary_mul},
    {"Slice", slice},
    {"SortV2", sort_values},
    {"StridedSlice", strided_slice},
    {"Swish", swish},
    {"Transpose", transpose},
};

}  // namespace

CANN_API aclError aclopCompileAndExecute(const char* type, int input_count, const aclTensorDesc* const* input_descs,
                                         const aclDataBuffer* const* inputs, int output_count,
                                         const aclTensorDesc* const* output_descs, aclDataBuffer* const* outputs,
                                         const aclopAttr* attributes, aclopEngineType, aclopCompileType, const char*,
                                         aclrtStream stream) {
    const auto kernel = kKernels.find(type);
    if (kernel == kKernels.end()) {
        return fail_launch(ACL_ERROR_OP_NOT_FOUND, "operator " + std::string(type) +
                           " is not emulated (called through aclopCompileAndExecute). Either its aclnn functions are "
                           "missing, or torch.npu.set_compile_mode(jit_compile=False) has not been called "
                           "(and on 310P torch.npu.config.allow_internal_format = False). "
                           "See 'Adding an operator' in emulator/README.md");
    }
    try {
        auto executor = std::make_unique<Executor>();
        Operands from, from_device, to;
        for (int i = 0; i < input_count; ++i) {
            from.push_back(describe(*input_descs[i], *inputs[i]));
            if (input_descs[i]->placement == ACL_MEMTYPE_DEVICE) from_device.push_back(from.back());
        }
        for (int i = 0; i < output_count; ++i) to.push_back(describe(*output_descs[i], *outputs[i]));
        executor->call = {kernel->first.c_str(), {{"inputs", from_device, "", true}, {"outputs", to, "", true}}};
        executor->run = [run = kernel->second, from, to, kept = attributes ? *attributes : aclopAttr{}] { run(from, to, kept); };
        if (const int code = refuse(executor->call)) return fail_launch(code, recent_message());
        return launch(executor.release(), stream);
    } catch (const std::exception& error) {
        return fail_launch(ACL_ERROR_INVALID_PARAM, std::string(type) + ": " + error.what());
    }
}

CANN_API aclError aclopCompileAndExecuteV2(const char* type, int input_count, aclTensorDesc** input_descs,
                                           aclDataBuffer** inputs, int output_count, aclTensorDesc** output_descs,
                                           aclDataBuffer** outputs, aclopAttr* attributes, aclopEngineType engine,
                                           aclopCompileType compile, const char* path, aclrtStream stream) {
    return aclopCompileAndExecute(type, input_count, input_descs, inputs, output_count, output_descs, outputs, attributes,
                                  engine, compile, path, stream);
}

// Operator dumps need an operator library; there is nothing to dump.
CANN_API aclError aclmdlInitDump() { return ACL_SUCCESS; }
CANN_API aclError aclmdlSetDump(const char*) { return ACL_SUCCESS; }
CANN_API aclError aclmdlFinalizeDump() { return ACL_SUCCESS; }
