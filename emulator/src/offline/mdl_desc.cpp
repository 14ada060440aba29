// What a model is: names, dtypes, sizes and profiles of its inputs and outputs.
#include <cmath>
#include <cstring>

#include "offline/aipp.h"
#include "offline/loaded.h"
#include "ops/tensor.h"

using namespace cann;
using namespace cann::offline;

namespace {

constexpr const char* kShapeInput = ACL_DYNAMIC_TENSOR_NAME;

size_t count_inputs(const aclmdlDesc& desc) {
    return desc.model->inputs.size() + (desc.model->dynamic == Dynamic::kNone ? 0 : 1);
}

bool is_shape_input(const aclmdlDesc& desc, size_t index) {
    return desc.model->dynamic != Dynamic::kNone && index == desc.model->inputs.size();
}

aclError check(const aclmdlDesc* desc, size_t index, bool is_input) {
    if (desc == nullptr || desc->model == nullptr) {
        return fail(ACL_ERROR_INVALID_PARAM, "the description is of no model: call aclmdlGetDesc first");
    }
    const size_t count = is_input ? count_inputs(*desc) : desc->model->outputs.size();
    if (index < count) return ACL_SUCCESS;
    return fail(ACL_ERROR_INVALID_PARAM, "the model has %zu %s, and none of index %zu", count,
                is_input ? "inputs" : "outputs", index);
}

// A name that does not fit is replaced, and aclmdlGetTensorRealName gives it back.
aclError describe(const aclmdlDesc* desc, const std::string& name, const char* kind, size_t index, const Ints& sizes,
                  aclmdlIODims* dims) {
    if (dims == nullptr) return fail(ACL_ERROR_INVALID_PARAM, "a pointer is null");
    if (sizes.size() > ACL_MAX_DIM_CNT) return fail(ACL_ERROR_STORAGE_OVER_LIMIT, "%s has too many dimensions", name.c_str());
    std::string shown = name;
    if (name.size() >= ACL_MAX_TENSOR_NAME_LEN) {
        shown = "acl_modelId_" + std::to_string(desc->id) + "_" + kind + "_" + std::to_string(index);
        desc->replaced.emplace_back(shown, name);
    }
    std::memset(dims, 0, sizeof *dims);
    shown.copy(dims->name, sizeof dims->name - 1);
    dims->dimCount = sizes.size();
    std::copy(sizes.begin(), sizes.end(), dims->dims);
    return ACL_SUCCESS;
}

// The sizes of an input; `stored`: their product is what the input's bytes are.
Ints sizes_of_input(const aclmdlDesc& desc, size_t index, bool stored) {
    if (is_shape_input(desc, index)) return {static_cast<int64_t>(shape_values(*desc.model))};
    const Port& port = desc.model->inputs[index];
    Ints sizes = port.sizes;
    if (!port.image.empty() && !stored && sizes[1] != -1) {
        sizes[1] = std::llround(static_cast<double>(sizes[1]) / stored_heights(port.image));
    }
    return sizes;
}

const std::string& name_of_input(const aclmdlDesc& desc, size_t index) {
    static const std::string shape_input = kShapeInput;
    return is_shape_input(desc, index) ? shape_input : desc.model->inputs[index].name;
}

aclError input_dims(const aclmdlDesc* desc, size_t index, aclmdlIODims* dims, bool stored) {
    if (const aclError code = check(desc, index, true)) return code;
    return describe(desc, name_of_input(*desc, index), "input", index, sizes_of_input(*desc, index, stored), dims);
}

aclError output_dims(const aclmdlDesc* desc, size_t index, aclmdlIODims* dims, size_t profile) {
    const Ints& sizes = desc->model->profiles[profile].outputs[index];
    return describe(desc, desc->model->outputs[index].name, "output", index, sizes, dims);
}

}  // namespace

CANN_API aclmdlDesc* aclmdlCreateDesc() { return new aclmdlDesc; }

CANN_API aclError aclmdlDestroyDesc(aclmdlDesc* desc) {
    delete desc;
    return ACL_SUCCESS;
}

CANN_API size_t aclmdlGetNumInputs(aclmdlDesc* desc) { return desc && desc->model ? count_inputs(*desc) : 0; }
CANN_API size_t aclmdlGetNumOutputs(aclmdlDesc* desc) { return desc && desc->model ? desc->model->outputs.size() : 0; }

CANN_API size_t aclmdlGetInputSizeByIndex(aclmdlDesc* desc, size_t index) {
    if (check(desc, index, true) != ACL_SUCCESS) return 0;
    if (is_shape_input(*desc, index)) return shape_values(*desc->model) * sizeof(int32_t);
    return desc->model->input_bytes(index);
}

CANN_API size_t aclmdlGetOutputSizeByIndex(aclmdlDesc* desc, size_t index) {
    return check(desc, index, false) == ACL_SUCCESS ? desc->model->output_bytes(index) : 0;
}

CANN_API const char* aclmdlGetInputNameByIndex(const aclmdlDesc* desc, size_t index) {
    return check(desc, index, true) == ACL_SUCCESS ? name_of_input(*desc, index).c_str() : "";
}

CANN_API const char* aclmdlGetOutputNameByIndex(const aclmdlDesc* desc, size_t index) {
    return check(desc, index, false) == ACL_SUCCESS ? desc->model->outputs[index].name.c_str() : "";
}

CANN_API aclDataType aclmdlGetInputDataType(const aclmdlDesc* desc, size_t index) {
    if (check(desc, index, true) != ACL_SUCCESS) return ACL_DT_UNDEFINED;
    return is_shape_input(*desc, index) ? ACL_INT32 : to_acl(desc->model->inputs[index].dtype);
}

CANN_API aclDataType aclmdlGetOutputDataType(const aclmdlDesc* desc, size_t index) {
    return check(desc, index, false) == ACL_SUCCESS ? to_acl(desc->model->outputs[index].dtype) : ACL_DT_UNDEFINED;
}

CANN_API aclFormat aclmdlGetInputFormat(const aclmdlDesc* desc, size_t index) {
    if (check(desc, index, true) != ACL_SUCCESS) return ACL_FORMAT_UNDEFINED;
    return is_shape_input(*desc, index) ? ACL_FORMAT_ND : static_cast<aclFormat>(desc->model->inputs[index].format);
}

CANN_API aclFormat aclmdlGetOutputFormat(const aclmdlDesc* desc, size_t index) {
    if (check(desc, index, false) != ACL_SUCCESS) return ACL_FORMAT_UNDEFINED;
    return static_cast<aclFormat>(desc->model->outputs[index].format);
}

CANN_API aclError aclmdlGetInputDims(const aclmdlDesc* desc, size_t index, aclmdlIODims* dims) {
    return input_dims(desc, index, dims, false);
}

CANN_API aclError aclmdlGetInputDimsV2(const aclmdlDesc* desc, size_t index, aclmdlIODims* dims) {
    return input_dims(desc, index, dims, true);
}

CANN_API aclError aclmdlGetOutputDims(const aclmdlDesc* desc, size_t index, aclmdlIODims* dims) {
    if (const aclError code = check(desc, index, false)) return code;
    return output_dims(desc, index, dims, desc->model->largest);
}

CANN_API aclError aclmdlGetCurOutputDims(const aclmdlDesc* desc, size_t index, aclmdlIODims* dims) {
    if (const aclError code = check(desc, index, false)) return code;
    const auto loaded = desc->loaded.lock();
    return output_dims(desc, index, dims, loaded ? loaded->chosen.load() : desc->model->largest);
}

CANN_API aclError aclmdlGetInputIndexByName(const aclmdlDesc* desc, const char* name, size_t* index) {
    if (name == nullptr || index == nullptr) return fail(ACL_ERROR_INVALID_PARAM, "a pointer is null");
    if (const aclError code = check(desc, 0, true)) return code;
    for (*index = 0; *index < count_inputs(*desc); ++*index) {
        if (name_of_input(*desc, *index) == name) return ACL_SUCCESS;
    }
    return fail(ACL_ERROR_INVALID_PARAM, "the model has no input %s", name);
}

CANN_API aclError aclmdlGetOutputIndexByName(const aclmdlDesc* desc, const char* name, size_t* index) {
    if (name == nullptr || index == nullptr) return fail(ACL_ERROR_INVALID_PARAM, "a pointer is null");
    if (const aclError code = check(desc, 0, false)) return code;
    for (*index = 0; *index < desc->model->outputs.size(); ++*index) {
        if (desc->model->outputs[*index].name == name) return ACL_SUCCESS;
    }
    return fail(ACL_ERROR_INVALID_PARAM, "the model has no output %s", name);
}

CANN_API const char* aclmdlGetTensorRealName(const aclmdlDesc* desc, const char* name) {
    if (desc == nullptr || name == nullptr || desc->model == nullptr) return nullptr;
    for (const auto& [shown, real] : desc->replaced) {
        if (shown == name || real == name) return real.c_str();
    }
    for (const auto* ports : {&desc->model->inputs, &desc->model->outputs}) {
        for (const Port& port : *ports) {
            if (port.name == name) return port.name.c_str();
        }
    }
    return nullptr;
}

// ---- profiles; a model without any has none to list ----

CANN_API aclError aclmdlGetDynamicBatch(const aclmdlDesc* desc, aclmdlBatch* batch) {
    if (const aclError code = check(desc, 0, false)) return code;
    *batch = {};
    if (desc->model->dynamic != Dynamic::kBatch) return ACL_SUCCESS;
    for (const Profile& profile : desc->model->profiles) batch->batch[batch->batchCount++] = profile.gear[0];
    return ACL_SUCCESS;
}

CANN_API aclError aclmdlGetDynamicHW(const aclmdlDesc* desc, size_t, aclmdlHW* hw) {
    if (const aclError code = check(desc, 0, false)) return code;
    *hw = {};
    if (desc->model->dynamic != Dynamic::kImage) return ACL_SUCCESS;
    for (const Profile& profile : desc->model->profiles) {
        std::copy(profile.gear.begin(), profile.gear.end(), hw->hw[hw->hwCount++]);
    }
    return ACL_SUCCESS;
}

CANN_API aclError aclmdlGetInputDynamicGearCount(const aclmdlDesc* desc, size_t index, size_t* count) {
    if (const aclError code = check(desc, 0, false)) return code;
    if (index != static_cast<size_t>(-1)) return fail(ACL_ERROR_INVALID_PARAM, "the index must be -1, and not %zu", index);
    *count = desc->model->dynamic == Dynamic::kDims ? desc->model->profiles.size() : 0;
    return ACL_SUCCESS;
}

// Of each profile the sizes of all inputs in a row.
CANN_API aclError aclmdlGetInputDynamicDims(const aclmdlDesc* desc, size_t index, aclmdlIODims* dims, size_t count) {
    size_t gears = 0;
    if (const aclError code = aclmdlGetInputDynamicGearCount(desc, index, &gears)) return code;
    if (count < gears) return fail(ACL_ERROR_INVALID_PARAM, "there is room for %zu of %zu profiles", count, gears);
    for (size_t i = 0; i < gears; ++i) {
        Ints all;
        for (const Ints& sizes : desc->model->profiles[i].inputs) all.insert(all.end(), sizes.begin(), sizes.end());
        if (const aclError code = describe(desc, "", "input", i, all, &dims[i])) return code;
    }
    return ACL_SUCCESS;
}

CANN_API aclError aclmdlGetAippType(uint32_t id, size_t index, aclmdlInputAippType* type, size_t* attached) {
    const auto loaded = find_model(id);
    if (loaded == nullptr) return ACL_ERROR_GE_EXEC_MODEL_ID_INVALID;
    const auto& inputs = loaded->model->inputs;
    if (index >= inputs.size()) return fail(ACL_ERROR_GE_PARAM_INVALID, "the model has no input %zu", index);
    *type = inputs[index].image.empty() ? ACL_DATA_WITHOUT_AIPP : ACL_DATA_WITH_STATIC_AIPP;
    *attached = ACL_INVALID_NODE_INDEX;
    return ACL_SUCCESS;
}
