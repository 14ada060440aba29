// Loading and unloading offline models. A file's weights are mapped: what they cover is device memory that nobody writes.
#include <sys/mman.h>

#include <cstring>
#include <map>

#include "offline/files.h"
#include "offline/loaded.h"
#include "runtime/memory.h"
#include "runtime/trace.h"

namespace cann::offline {
namespace {

std::mutex guard;
// Never destroyed: a program may end without unloading, and streams and memory are gone by then.
std::map<uint32_t, std::shared_ptr<LoadedModel>>& models = *new std::map<uint32_t, std::shared_ptr<LoadedModel>>;
uint32_t next_id = 1;

constexpr size_t kLeastBytes = 512;  // of memory that a program asks for: 0 bytes could not be allocated

size_t work_bytes(const OfflineModel& model) { return std::max(model.feature_bytes(), kLeastBytes); }
size_t weight_bytes(const Parts& parts) { return std::max(parts.weights.size(), kLeastBytes); }

// Memory of the device that goes back when the model does.
class DeviceMemory {
public:
    explicit DeviceMemory(size_t size) {
        const aclError code = aclrtMalloc(&data_, size, ACL_MEM_MALLOC_HUGE_FIRST);
        if (code != ACL_SUCCESS) throw Failure(code, recent_message());
    }
    // A part of a file, read only.
    DeviceMemory(const MappedFile& file, size_t offset, size_t size) : mapped_(size), device_(current_device()) {
        if (!reserve_capacity(device_, size)) {
            throw Failure(ACL_ERROR_RT_MEMORY_ALLOCATION, "device " + std::to_string(device_) + " has not " +
                          std::to_string(size) + " bytes left for the weights");
        }
        data_ = file.map(offset, size);
        add_region({static_cast<char*>(data_), size, device_});
    }
    ~DeviceMemory() {
        if (mapped_ == 0) {
            aclrtFree(data_);
            return;
        }
        remove_region(data_, false);
        munmap(data_, mapped_);
        release_capacity(device_, mapped_);
    }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    char* data() const { return static_cast<char*>(data_); }

private:
    void* data_ = nullptr;
    size_t mapped_ = 0;
    int32_t device_ = 0;
};

struct Owner : LoadedModel {
    std::unique_ptr<DeviceMemory> own_weights, own_work;

    ~Owner() {
        if (own_stream != nullptr) aclrtDestroyStream(own_stream);
    }
};

// Where the program wants the model's memory; nullptr: the model has memory of its own.
struct Places {
    void* work = nullptr;
    size_t work_size = 0;
    void* weights = nullptr;
    size_t weight_size = 0;
};

char* check_place(const char* what, void* memory, size_t size, size_t needed) {
    const Region region = find_region(memory);
    const std::string name = std::string("the memory for ") + what;
    if (!region || region.device != current_device()) {
        throw Failure(ACL_ERROR_GE_PARAM_INVALID, name + " is not on device " + std::to_string(current_device()));
    }
    if (size < needed || region.after(memory) < needed) {
        throw Failure(ACL_ERROR_GE_PARAM_INVALID, name + " has " + std::to_string(size) + " bytes, and the model needs " +
                      std::to_string(needed));
    }
    return static_cast<char*>(memory);
}

void load_weights(Owner& loaded, const Parts& parts, const MappedFile* file, const Places& places) {
    const size_t size = parts.weights.size();
    if (places.weights != nullptr) {
        loaded.weights = check_place("weights", places.weights, places.weight_size, weight_bytes(parts));
    } else if (file != nullptr && size > 0) {
        loaded.own_weights = std::make_unique<DeviceMemory>(*file, parts.weights_offset, size);
        loaded.weights = loaded.own_weights->data();
        return;
    } else {
        loaded.own_weights = std::make_unique<DeviceMemory>(weight_bytes(parts));
        loaded.weights = loaded.own_weights->data();
    }
    std::memcpy(loaded.weights, parts.weights.data(), size);
}

uint32_t load(std::string_view content, const MappedFile* file, const Places& places) {
    const Parts parts = check_parts(content);
    auto loaded = std::make_shared<Owner>();
    loaded->model = std::make_shared<OfflineModel>(parse(parts));
    loaded->device = current_device();
    loaded->chosen = loaded->model->largest;
    load_weights(*loaded, parts, file, places);
    place_weights(*loaded->model, loaded->weights);
    if (places.work != nullptr) {
        loaded->work = check_place("work", places.work, places.work_size, work_bytes(*loaded->model));
    } else {
        loaded->own_work = std::make_unique<DeviceMemory>(work_bytes(*loaded->model));
        loaded->work = loaded->own_work->data();
    }
    if (trace::enabled()) {
        for (const Profile& profile : loaded->model->profiles) trace::write(graph::trace_line(profile.compiled));
    }
    std::lock_guard<std::mutex> lock(guard);
    loaded->id = next_id++;
    models[loaded->id] = loaded;
    return loaded->id;
}

template <class Work>
aclError guarded(const char* function, const std::string& what, Work work) {
    try {
        work();
        return ACL_SUCCESS;
    } catch (const Failure& failure) {
        return fail(failure.code, "%s: %s", function, failure.what());
    } catch (const Unreadable& error) {
        return fail(ACL_ERROR_GE_LOAD_MODEL, "%s: %s cannot be loaded: %s", function, what.c_str(), error.what());
    } catch (const std::exception& error) {
        return fail(ACL_ERROR_GE_EXEC_MODEL_PATH_INVALID, "%s: %s", function, error.what());
    }
}

aclError load_file(const char* function, const char* path, uint32_t* id, const Places& places) {
    if (path == nullptr || id == nullptr) return fail(ACL_ERROR_INVALID_PARAM, "%s: a pointer is null", function);
    return guarded(function, path, [&] {
        const MappedFile file(path);
        *id = load(file.content(), &file, places);
    });
}

aclError load_memory(const char* function, const void* model, size_t size, uint32_t* id, const Places& places) {
    if (model == nullptr || id == nullptr) return fail(ACL_ERROR_INVALID_PARAM, "%s: a pointer is null", function);
    return guarded(function, "the model in memory", [&] {
        *id = load({static_cast<const char*>(model), size}, nullptr, places);
    });
}

void query(std::string_view content, size_t* work, size_t* weights) {
    const Parts parts = check_parts(content);
    *work = work_bytes(parse(parts));
    *weights = weight_bytes(parts);
}

}  // namespace

std::shared_ptr<LoadedModel> find_model(uint32_t id) {
    std::lock_guard<std::mutex> lock(guard);
    const auto found = models.find(id);
    if (found != models.end()) return found->second;
    fail(ACL_ERROR_GE_EXEC_MODEL_ID_INVALID, "there is no model %u", id);
    return nullptr;
}

size_t shape_values(const OfflineModel& model) {
    return model.dynamic == Dynamic::kNone ? 0 : model.profiles[0].gear.size();
}

}  // namespace cann::offline

using namespace cann;
using namespace cann::offline;

CANN_API aclError aclmdlLoadFromFile(const char* path, uint32_t* id) {
    return load_file("aclmdlLoadFromFile", path, id, {});
}

CANN_API aclError aclmdlLoadFromMem(const void* model, size_t size, uint32_t* id) {
    return load_memory("aclmdlLoadFromMem", model, size, id, {});
}

CANN_API aclError aclmdlLoadFromFileWithMem(const char* path, uint32_t* id, void* work, size_t work_size, void* weights,
                                            size_t weight_size) {
    return load_file("aclmdlLoadFromFileWithMem", path, id, {work, work_size, weights, weight_size});
}

CANN_API aclError aclmdlLoadFromMemWithMem(const void* model, size_t size, uint32_t* id, void* work, size_t work_size,
                                           void* weights, size_t weight_size) {
    return load_memory("aclmdlLoadFromMemWithMem", model, size, id, {work, work_size, weights, weight_size});
}

CANN_API aclError aclmdlQuerySize(const char* path, size_t* work, size_t* weights) {
    if (path == nullptr || work == nullptr || weights == nullptr) {
        return fail(ACL_ERROR_INVALID_PARAM, "aclmdlQuerySize: a pointer is null");
    }
    return guarded("aclmdlQuerySize", path, [&] { query(MappedFile(path).content(), work, weights); });
}

CANN_API aclError aclmdlQuerySizeFromMem(const void* model, size_t size, size_t* work, size_t* weights) {
    if (model == nullptr || work == nullptr || weights == nullptr) {
        return fail(ACL_ERROR_INVALID_PARAM, "aclmdlQuerySizeFromMem: a pointer is null");
    }
    return guarded("aclmdlQuerySizeFromMem", "the model in memory",
                   [&] { query({static_cast<const char*>(model), size}, work, weights); });
}

CANN_API aclError aclmdlUnload(uint32_t id) {
    std::shared_ptr<LoadedModel> model = find_model(id);
    if (model == nullptr) return ACL_ERROR_GE_EXEC_MODEL_ID_INVALID;
    if (model->device != current_device()) {
        return fail(ACL_ERROR_RT_MODEL_CONTEXT, "model %u was loaded on device %d, and this thread's is %d", id,
                    model->device, current_device());
    }
    synchronize_device(model->device);  // for the work that may still use the model's memory
    std::lock_guard<std::mutex> lock(guard);
    models.erase(id);
    return ACL_SUCCESS;
}

CANN_API aclError aclmdlGetDesc(aclmdlDesc* desc, uint32_t id) {
    const std::shared_ptr<LoadedModel> loaded = find_model(id);
    if (loaded == nullptr) return ACL_ERROR_GE_EXEC_MODEL_ID_INVALID;
    *desc = {loaded->model, loaded, id, {}};
    return ACL_SUCCESS;
}

CANN_API aclError aclmdlGetDescFromFile(aclmdlDesc* desc, const char* path) {
    return guarded("aclmdlGetDescFromFile", path, [&] {
        *desc = {std::make_shared<OfflineModel>(parse(check_parts(MappedFile(path).content()))), {}, 0, {}};
    });
}

CANN_API aclError aclmdlGetDescFromMem(aclmdlDesc* desc, const void* model, size_t size) {
    return guarded("aclmdlGetDescFromMem", "the model in memory", [&] {
        *desc = {std::make_shared<OfflineModel>(parse(check_parts({static_cast<const char*>(model), size}))), {}, 0, {}};
    });
}
