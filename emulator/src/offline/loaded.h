// Offline models that are loaded on a device, and the objects of the aclmdl functions.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

#include "acl/acl_mdl.h"
#include "ge/ge_error_codes.h"
#include "offline/om.h"
#include "ops/descriptors.h"
#include "runtime/stream.h"

namespace cann::offline {

struct LoadedModel {
    uint32_t id = 0;
    int32_t device = 0;  // the one that was current when it was loaded: CANN's "same context"
    std::shared_ptr<OfflineModel> model;
    char *weights = nullptr, *work = nullptr;
    std::atomic<size_t> chosen{0};  // the profile of the latest Set call, for aclmdlGetCurOutputDims
    std::mutex running;             // work memory is for one run at a time
    aclrtStream own_stream = nullptr;  // of aclmdlExecute
    // The stream that was launched on last, and its marks at the time: see Stream::marks.
    aclrtStream last_stream = nullptr;
    uint64_t last_marks = 0;
};

// nullptr, and an error for aclGetRecentErrMsg, for an id that is none.
std::shared_ptr<LoadedModel> find_model(uint32_t id);

// How many values the input ascend_mbatch_shape_data has; 0: the model has no such input.
size_t shape_values(const OfflineModel& model);

}  // namespace cann::offline

struct aclmdlDesc {
    std::shared_ptr<const cann::offline::OfflineModel> model;
    std::weak_ptr<cann::offline::LoadedModel> loaded;
    uint32_t id = 0;
    mutable std::vector<std::pair<std::string, std::string>> replaced;  // names that are too long for aclmdlIODims
};

struct aclmdlDataset {
    std::vector<aclDataBuffer*> buffers;
    std::vector<aclTensorDesc*> descs;
    int64_t profile = -1;  // that a Set call has chosen; -1: the largest
};
