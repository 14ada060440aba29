// The channel from the device to the host's standard error, which torchair opens for its print operator. No emulated
// operator sends anything, so that receiving waits until its time is over.
#include <chrono>
#include <thread>

#include "acl/acl_tdt.h"
#include "runtime/runtime.h"

struct acltdtChannelHandle {};
struct acltdtDataset {};

using namespace cann;

CANN_API acltdtChannelHandle* acltdtCreateChannelWithCapacity(uint32_t, const char*, size_t) {
    return new acltdtChannelHandle;
}

CANN_API aclError acltdtDestroyChannel(acltdtChannelHandle* channel) {
    delete channel;
    return ACL_SUCCESS;
}

CANN_API acltdtDataset* acltdtCreateDataset() { return new acltdtDataset; }

CANN_API aclError acltdtDestroyDataset(acltdtDataset* dataset) {
    delete dataset;
    return ACL_SUCCESS;
}

CANN_API aclError acltdtReceiveTensor(const acltdtChannelHandle*, acltdtDataset*, int32_t milliseconds) {
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    return fail(ACL_ERROR_RT_QUEUE_EMPTY, "nothing was sent");
}

CANN_API size_t acltdtGetDatasetSize(const acltdtDataset*) { return 0; }
CANN_API acltdtDataItem* acltdtGetDataItem(const acltdtDataset*, size_t) { return nullptr; }
CANN_API void* acltdtGetDataAddrFromItem(const acltdtDataItem*) { return nullptr; }
CANN_API size_t acltdtGetDataSizeFromItem(const acltdtDataItem*) { return 0; }
CANN_API size_t acltdtGetDimNumFromItem(const acltdtDataItem*) { return 0; }
CANN_API aclDataType acltdtGetDataTypeFromItem(const acltdtDataItem*) { return ACL_DT_UNDEFINED; }
CANN_API aclError acltdtGetDimsFromItem(const acltdtDataItem*, int64_t*, size_t) {
    return fail(ACL_ERROR_INVALID_PARAM, "there is no item");
}
