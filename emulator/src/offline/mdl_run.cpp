// Datasets, the choice of a profile, and running a model.
#include <algorithm>
#include <cstring>

#include <c10/util/strides.h>

#include "graph/runner.h"
#include "offline/loaded.h"
#include "races/check.h"
#include "runtime/memory.h"
#include "runtime/trace.h"

using namespace cann;
using namespace cann::offline;

struct aclmdlExecConfigHandle {};

CANN_API aclmdlDataset* aclmdlCreateDataset() { return new aclmdlDataset; }

// Neither the buffers nor the memory are the dataset's.
CANN_API aclError aclmdlDestroyDataset(const aclmdlDataset* dataset) {
    if (dataset == nullptr) return fail(ACL_ERROR_INVALID_PARAM, "the dataset is null");
    delete dataset;
    return ACL_SUCCESS;
}

CANN_API aclError aclmdlAddDatasetBuffer(aclmdlDataset* dataset, aclDataBuffer* buffer) {
    if (dataset == nullptr || buffer == nullptr) return fail(ACL_ERROR_INVALID_PARAM, "a pointer is null");
    dataset->buffers.push_back(buffer);
    dataset->descs.push_back(nullptr);
    return ACL_SUCCESS;
}

CANN_API size_t aclmdlGetDatasetNumBuffers(const aclmdlDataset* dataset) { return dataset ? dataset->buffers.size() : 0; }

CANN_API aclDataBuffer* aclmdlGetDatasetBuffer(const aclmdlDataset* dataset, size_t index) {
    return dataset != nullptr && index < dataset->buffers.size() ? dataset->buffers[index] : nullptr;
}

CANN_API aclError aclmdlSetDatasetTensorDesc(aclmdlDataset* dataset, aclTensorDesc* desc, size_t index) {
    if (dataset == nullptr || index >= dataset->descs.size()) {
        return fail(ACL_ERROR_INVALID_PARAM, "the dataset has no buffer of index %zu", index);
    }
    dataset->descs[index] = desc;
    return ACL_SUCCESS;
}

CANN_API aclTensorDesc* aclmdlGetDatasetTensorDesc(const aclmdlDataset* dataset, size_t index) {
    return dataset != nullptr && index < dataset->descs.size() ? dataset->descs[index] : nullptr;
}

namespace {

// Notes the profile in the dataset and writes its values to the input ascend_mbatch_shape_data.
aclError choose(uint32_t id, aclmdlDataset* dataset, size_t index, Dynamic dynamic, const Ints& wanted,
                const char* function) {
    const auto loaded = find_model(id);
    if (loaded == nullptr) return ACL_ERROR_GE_EXEC_MODEL_ID_INVALID;
    const OfflineModel& model = *loaded->model;
    const aclDataBuffer* buffer = aclmdlGetDatasetBuffer(dataset, index);
    if (buffer == nullptr || buffer->data == nullptr) {
        return fail(ACL_ERROR_INVALID_PARAM, "%s: the dataset has no memory at index %zu", function, index);
    }
    if (model.dynamic != dynamic) {
        return fail(ACL_ERROR_GE_DYNAMIC_BATCH_SIZE_INVALID, "%s: the model was not converted for it", function);
    }
    if (index != model.inputs.size()) {
        return fail(ACL_ERROR_GE_DYNAMIC_INPUT_ADDR_INVALID, "%s: index %zu is not that of " ACL_DYNAMIC_TENSOR_NAME
                    ", which is %zu", function, index, model.inputs.size());
    }
    for (size_t i = 0; i < model.profiles.size(); ++i) {
        Ints key = model.profiles[i].gear;
        if (dynamic == Dynamic::kDims) {
            key.clear();
            for (const Ints& sizes : model.profiles[i].inputs) key.insert(key.end(), sizes.begin(), sizes.end());
        }
        if (key != wanted) continue;
        const std::vector<int32_t> values(model.profiles[i].gear.begin(), model.profiles[i].gear.end());
        const size_t bytes = values.size() * sizeof(int32_t);
        const Region region = find_region(buffer->data);
        if (buffer->size < bytes || !region || region.after(buffer->data) < bytes) {
            return fail(ACL_ERROR_GE_DYNAMIC_INPUT_LENGTH_INVALID, "%s: the input " ACL_DYNAMIC_TENSOR_NAME
                        " needs %zu bytes of device memory", function, bytes);
        }
        std::memcpy(buffer->data, values.data(), bytes);
        dataset->profile = static_cast<int64_t>(i);
        loaded->chosen = i;
        return ACL_SUCCESS;
    }
    std::string text;
    for (int64_t size : wanted) text += (text.empty() ? "" : ",") + std::to_string(size);
    return fail(ACL_ERROR_GE_DYNAMIC_BATCH_SIZE_INVALID, "%s: %s is no profile of the model", function, text.c_str());
}

}  // namespace

CANN_API aclError aclmdlSetDynamicBatchSize(uint32_t id, aclmdlDataset* dataset, size_t index, uint64_t batch) {
    return choose(id, dataset, index, Dynamic::kBatch, {static_cast<int64_t>(batch)}, "aclmdlSetDynamicBatchSize");
}

CANN_API aclError aclmdlSetDynamicHWSize(uint32_t id, aclmdlDataset* dataset, size_t index, uint64_t height,
                                         uint64_t width) {
    const Ints wanted{static_cast<int64_t>(height), static_cast<int64_t>(width)};
    return choose(id, dataset, index, Dynamic::kImage, wanted, "aclmdlSetDynamicHWSize");
}

CANN_API aclError aclmdlSetInputDynamicDims(uint32_t id, aclmdlDataset* dataset, size_t index, const aclmdlIODims* dims) {
    if (dims == nullptr || dims->dimCount > ACL_MAX_DIM_CNT) return fail(ACL_ERROR_INVALID_PARAM, "the dimensions are invalid");
    const Ints wanted(dims->dims, dims->dims + dims->dimCount);
    return choose(id, dataset, index, Dynamic::kDims, wanted, "aclmdlSetInputDynamicDims");
}

namespace {

TensorArgument argument_of(void* data, at::ScalarType dtype, const Ints& sizes) {
    const auto strides = c10::contiguous_strides(sizes);
    return {dtype, sizes, {strides.begin(), strides.end()}, 0, ACL_FORMAT_ND, sizes, static_cast<char*>(data)};
}

void check_buffer(const LoadedModel& loaded, const aclDataBuffer* buffer, const std::string& what, size_t needed) {
    const auto refuse = [&](const std::string& reason) { throw Failure(ACL_ERROR_GE_PARAM_INVALID, what + " " + reason); };
    if (buffer->size < needed) {
        refuse("has " + std::to_string(buffer->size) + " bytes, and the model needs " + std::to_string(needed));
    }
    const Region region = find_region(buffer->data);
    if (needed == 0) return;
    if (!region || region.device == kHost || !reaches(loaded.device, region.device)) {
        refuse("is not in the memory of device " + std::to_string(loaded.device));
    }
    if (region.after(buffer->data) < needed) refuse("reaches beyond the memory that it is in");
}

// Memory for outputs that the program left open: it is the program's from then on.
void allocate_outputs(const LoadedModel& loaded, const Profile& profile, aclmdlDataset& output) {
    for (size_t i = 0; i < output.buffers.size() && i < profile.outputs.size(); ++i) {
        aclDataBuffer& buffer = *output.buffers[i];
        if (buffer.data != nullptr) continue;
        buffer.size = bytes_of(profile.outputs[i], loaded.model->outputs[i].dtype);
        if (const aclError code = aclrtMalloc(&buffer.data, buffer.size, ACL_MEM_MALLOC_HUGE_FIRST)) {
            throw Failure(code, recent_message());
        }
    }
}

void check_count(const char* what, size_t count, size_t needed) {
    if (count == needed) return;
    throw Failure(ACL_ERROR_GE_PARAM_INVALID, "there are " + std::to_string(count) + " " + what + ", and the model has " +
                  std::to_string(needed));
}

graph::Memory memory_of(const LoadedModel& loaded, const Profile& profile, const aclmdlDataset& input,
                        const aclmdlDataset& output) {
    const OfflineModel& model = *loaded.model;
    check_count("inputs", input.buffers.size(), model.inputs.size() + (model.dynamic == Dynamic::kNone ? 0 : 1));
    check_count("outputs", output.buffers.size(), model.outputs.size());
    graph::Memory memory;
    memory.constants = loaded.weights;
    memory.features = loaded.work;
    for (size_t i = 0; i < model.inputs.size(); ++i) {
        const Port& port = model.inputs[i];
        check_buffer(loaded, input.buffers[i], "input " + port.name, bytes_of(profile.inputs[i], port.dtype));
        memory.inputs.push_back(argument_of(input.buffers[i]->data, port.dtype, profile.inputs[i]));
    }
    for (size_t i = 0; i < model.outputs.size(); ++i) {
        const Port& port = model.outputs[i];
        check_buffer(loaded, output.buffers[i], "output " + port.name, bytes_of(profile.outputs[i], port.dtype));
        memory.outputs.push_back(argument_of(output.buffers[i]->data, port.dtype, profile.outputs[i]));
    }
    return memory;
}

// A shape of its own for an input is for models of unlimited shapes; it may only say what the profile says.
void check_descs(const Profile& profile, const aclmdlDataset& input) {
    for (size_t i = 0; i < profile.inputs.size() && i < input.descs.size(); ++i) {
        if (input.descs[i] == nullptr || input.descs[i]->dims == profile.inputs[i]) continue;
        throw Failure(ACL_ERROR_GE_PARAM_INVALID, "aclmdlSetDatasetTensorDesc gives input " + std::to_string(i) +
                      " a shape that is not the model's");
    }
}

// Work memory and profile are the model's: what runs on one stream must be done before it runs on another.
void check_order(LoadedModel& loaded, aclrtStream handle, const Stream& stream) {
    const Stream* last = loaded.last_stream == nullptr ? nullptr : find_stream(loaded.last_stream);
    if (last != nullptr && last != &stream && last->marks == loaded.last_marks) {
        throw Failure(ACL_ERROR_GE_PARAM_INVALID, "model " + std::to_string(loaded.id) + " may still run on another stream: "
                      "wait for that first, or load the model twice");
    }
    loaded.last_stream = handle;
    loaded.last_marks = stream.marks;
}

void check_context(const LoadedModel& loaded, const Stream& stream) {
    const std::string model = "model " + std::to_string(loaded.id) + " was loaded on device " + std::to_string(loaded.device);
    if (loaded.device != current_device()) {
        throw Failure(ACL_ERROR_RT_MODEL_CONTEXT, model + ", and this thread's is " + std::to_string(current_device()));
    }
    if (stream.device != loaded.device) {
        throw Failure(ACL_ERROR_RT_STREAM_CONTEXT, model + ", and the stream is of device " + std::to_string(stream.device));
    }
}

int launch(const std::shared_ptr<LoadedModel>& loaded, const aclmdlDataset& input, aclmdlDataset& output,
           aclrtStream handle, Stream& stream, bool allocates) {
    const size_t index = input.profile < 0 ? loaded->model->largest : static_cast<size_t>(input.profile);
    if (index >= loaded->model->profiles.size()) throw Failure(ACL_ERROR_GE_PARAM_INVALID, "the dataset is another model's");
    const Profile& profile = loaded->model->profiles[index];
    check_context(*loaded, stream);
    check_descs(profile, input);
    if (allocates) allocate_outputs(*loaded, profile, output);
    const graph::Memory memory = memory_of(*loaded, profile, input, output);
    check_order(*loaded, handle, stream);
    graph::check_races(profile.compiled, memory, stream, false);
    return stream.launch([loaded, &profile, memory, &stream] { return graph::run(profile.compiled, memory, stream); });
}

// `waits`: on the model's own stream if there is none, and until it is done.
aclError execute(const char* function, uint32_t id, const aclmdlDataset* input, aclmdlDataset* output, aclrtStream handle,
                 bool waits) {
    if (input == nullptr || output == nullptr) return fail(ACL_ERROR_INVALID_PARAM, "%s: a dataset is null", function);
    const std::shared_ptr<LoadedModel> loaded = find_model(id);
    if (loaded == nullptr) return ACL_ERROR_GE_EXEC_MODEL_ID_INVALID;
    if (const aclError code = fault()) return code;
    const std::unique_lock<std::mutex> lock(loaded->running, std::try_to_lock);
    if (!lock) return fail(ACL_ERROR_GE_PARAM_INVALID, "%s: another thread runs model %u", function, id);
    if (waits && handle == nullptr) {
        if (loaded->own_stream == nullptr) aclrtCreateStream(&loaded->own_stream);
        handle = loaded->own_stream;
    }
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return fail(ACL_ERROR_INVALID_RESOURCE_HANDLE, "%s: the stream does not exist", function);
    try {
        const int code = launch(loaded, *input, *output, stream, *stream, waits);
        return code != 0 || !waits ? code : aclrtSynchronizeStream(stream);
    } catch (const Failure& failure) {
        return fail(failure.code, "%s: %s", function, failure.what());
    } catch (const std::exception& error) {
        return fail(ACL_ERROR_GE_INTERNAL_ERROR, "%s: %s", function, error.what());
    }
}

}  // namespace

CANN_API aclError aclmdlExecute(uint32_t id, const aclmdlDataset* input, aclmdlDataset* output) {
    return execute("aclmdlExecute", id, input, output, nullptr, true);
}

CANN_API aclError aclmdlExecuteAsync(uint32_t id, const aclmdlDataset* input, aclmdlDataset* output, aclrtStream stream) {
    return execute("aclmdlExecuteAsync", id, input, output, stream, false);
}

CANN_API aclmdlExecConfigHandle* aclmdlCreateExecConfigHandle() { return new aclmdlExecConfigHandle; }

CANN_API aclError aclmdlDestroyExecConfigHandle(const aclmdlExecConfigHandle* handle) {
    delete handle;
    return ACL_SUCCESS;
}

// Nothing runs long enough here to be timed out.
CANN_API aclError aclmdlSetExecConfigOpt(aclmdlExecConfigHandle* handle, aclmdlExecConfigAttr attribute, const void* value,
                                         size_t) {
    if (handle == nullptr || value == nullptr) return fail(ACL_ERROR_INVALID_PARAM, "a pointer is null");
    if (attribute == ACL_MDL_STREAM_SYNC_TIMEOUT || attribute == ACL_MDL_EVENT_SYNC_TIMEOUT) return ACL_SUCCESS;
    return fail(ACL_ERROR_API_NOT_SUPPORT, "the attribute %d of a run is not emulated", static_cast<int>(attribute));
}

CANN_API aclError aclmdlExecuteV2(uint32_t id, const aclmdlDataset* input, aclmdlDataset* output, aclrtStream stream,
                                  const aclmdlExecConfigHandle*) {
    return execute("aclmdlExecuteV2", id, input, output, stream, true);
}

CANN_API aclError aclmdlExecuteAsyncV2(uint32_t id, const aclmdlDataset* input, aclmdlDataset* output, aclrtStream stream,
                                       const aclmdlExecConfigHandle*) {
    return execute("aclmdlExecuteAsyncV2", id, input, output, stream, false);
}
