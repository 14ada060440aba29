// The old operator interface (aclop*). torch_npu falls back to it silently when an aclnn symbol is missing, so its
// descriptors work, and executing an operator that nobody emulates fails and names the operator. The operators are
// those of compiled graphs (graph/operation.h).
#include <vector>

#include <c10/util/strides.h>

#include "graph/operation.h"
#include "ops/descriptors.h"
#include "ops/operator.h"

struct aclopAttr {
    cann::graph::Attributes values;
};

using namespace cann;

CANN_API aclDataBuffer* aclCreateDataBuffer(void* data, size_t size) { return new aclDataBuffer{data, size}; }

CANN_API aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
    delete buffer;
    return ACL_SUCCESS;
}

CANN_API void* aclGetDataBufferAddr(const aclDataBuffer* buffer) { return buffer->data; }
CANN_API size_t aclGetDataBufferSizeV2(const aclDataBuffer* buffer) { return buffer->size; }
CANN_API uint32_t aclGetDataBufferSize(const aclDataBuffer* buffer) { return static_cast<uint32_t>(buffer->size); }
CANN_API aclError aclUpdateDataBuffer(aclDataBuffer* buffer, void* data, size_t size) {
    *buffer = {data, size};
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

// 0 for a type without a size and for a tensor whose shape is open.
CANN_API size_t aclDataTypeSize(aclDataType type) {
    try {
        return c10::elementSize(from_acl(type));
    } catch (const c10::Error&) {
        return 0;
    }
}

CANN_API size_t aclGetTensorDescSize(const aclTensorDesc* desc) {
    size_t size = aclDataTypeSize(desc->type);
    for (int64_t dim : desc->dims) size *= static_cast<size_t>(std::max<int64_t>(dim, 0));
    return size;
}

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

// A constant operand lies in host memory, as one that is placed there.
CANN_API aclError aclSetTensorConst(aclTensorDesc* desc, void*, size_t) {
    desc->placement = ACL_MEMTYPE_HOST;
    return ACL_SUCCESS;
}

CANN_API aclopAttr* aclopCreateAttr() { return new aclopAttr; }
CANN_API void aclopDestroyAttr(const aclopAttr* attr) { delete attr; }

namespace {

template <class T>
std::vector<T> list_of(int count, const auto* values) {
    return std::vector<T>(values, values + count);
}

aclError set_attribute(aclopAttr* attributes, const char* name, graph::Attribute value) {
    attributes->values[name] = std::move(value);
    return ACL_SUCCESS;
}

}  // namespace

CANN_API aclError aclopSetAttrBool(aclopAttr* to, const char* name, uint8_t v) {
    return set_attribute(to, name, static_cast<int64_t>(v));
}
CANN_API aclError aclopSetAttrDataType(aclopAttr* to, const char* name, aclDataType v) {
    return set_attribute(to, name, static_cast<int64_t>(v));
}
CANN_API aclError aclopSetAttrFloat(aclopAttr* to, const char* name, float v) {
    return set_attribute(to, name, static_cast<double>(v));
}
CANN_API aclError aclopSetAttrInt(aclopAttr* to, const char* name, int64_t v) { return set_attribute(to, name, v); }
CANN_API aclError aclopSetAttrString(aclopAttr* to, const char* name, const char* v) {
    return set_attribute(to, name, std::string(v));
}
CANN_API aclError aclopSetAttrListBool(aclopAttr* to, const char* name, int count, const uint8_t* v) {
    return set_attribute(to, name, list_of<int64_t>(count, v));
}
CANN_API aclError aclopSetAttrListFloat(aclopAttr* to, const char* name, int count, const float* v) {
    return set_attribute(to, name, list_of<double>(count, v));
}
CANN_API aclError aclopSetAttrListInt(aclopAttr* to, const char* name, int count, const int64_t* v) {
    return set_attribute(to, name, list_of<int64_t>(count, v));
}
CANN_API aclError aclopSetAttrListListInt(aclopAttr* to, const char* name, int count, const int* lengths,
                                          const int64_t* const* v) {
    std::vector<graph::Ints> lists;
    for (int i = 0; i < count; ++i) lists.push_back(list_of<int64_t>(lengths[i], v[i]));
    return set_attribute(to, name, lists);
}

namespace {

using Arguments = std::vector<std::shared_ptr<TensorArgument>>;

// An input in host memory: small, and gone after the call.
struct HostOperand : TensorArgument {
    explicit HostOperand(const aclDataBuffer& buffer)
        : copy(static_cast<char*>(buffer.data), static_cast<char*>(buffer.data) + buffer.size) {
        data = copy.data();
    }

    std::vector<char> copy;
};

// torch_npu describes what it stores (sizes and format) and what that means (storage_dims of a private format). An
// input that it leaves out has no type.
std::shared_ptr<TensorArgument> describe(const aclTensorDesc& desc, const aclDataBuffer& buffer) {
    if (desc.type == ACL_DT_UNDEFINED) return nullptr;
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

void execute(const graph::Operation& operation, const Arguments& from, const Arguments& to,
             const graph::Attributes& attributes) {
    std::vector<graph::Operands::Input> inputs;
    for (const auto& argument : from) {
        const Tensor tensor = argument ? argument->read() : Tensor();
        inputs.push_back({"", tensor, tensor});
    }
    const graph::Results results = operation.kernel(graph::Operands(std::move(inputs), attributes, to.size()));
    for (size_t i = 0; i < to.size(); ++i) write(operation, results.at(i), *to[i]);
    if (operation.kind == graph::Kind::kAssigns && !from.empty()) write(operation, results.at(0), *from[0]);
}

}  // namespace

CANN_API aclError aclopCompileAndExecute(const char* type, int input_count, const aclTensorDesc* const* input_descs,
                                         const aclDataBuffer* const* inputs, int output_count,
                                         const aclTensorDesc* const* output_descs, aclDataBuffer* const* outputs,
                                         const aclopAttr* attributes, aclopEngineType, aclopCompileType, const char*,
                                         aclrtStream stream) {
    const graph::Operation* operation = graph::find_operation(type);
    if (operation == nullptr) {
        return fail_launch(ACL_ERROR_OP_NOT_FOUND, "operator " + std::string(type) +
                           " is not emulated (called through aclopCompileAndExecute). Either its aclnn functions are "
                           "missing, or torch.npu.set_compile_mode(jit_compile=False) has not been called "
                           "(and on 310P torch.npu.config.allow_internal_format = False). "
                           "See 'Adding an operator' in emulator/README.md");
    }
    try {
        auto executor = std::make_unique<Executor>();
        Arguments from, from_device, to;
        for (int i = 0; i < input_count; ++i) {
            from.push_back(describe(*input_descs[i], *inputs[i]));
            if (from.back() && input_descs[i]->placement == ACL_MEMTYPE_DEVICE) from_device.push_back(from.back());
        }
        for (int i = 0; i < output_count; ++i) to.push_back(describe(*output_descs[i], *outputs[i]));
        const bool assigns = operation->kind == graph::Kind::kAssigns;
        executor->call = {operation->name, {{"inputs", from_device, "", true, assigns}, {"outputs", to, "", true, true}}};
        executor->run = [operation, from, to, kept = attributes ? attributes->values : graph::Attributes{}] {
            execute(*operation, from, to, kept);
        };
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
