// Devices and contexts. Each device has one primary context; a context is the address of its device's slot.
// Numbers are the process's own, of the devices that it sees, but where the machine's are asked for.
#include <malloc.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <climits>
#include <cstring>

#include "races/check.h"
#include "runtime/memory.h"
#include "runtime/stream.h"
#include "runtime/trace.h"
#include "runtime/visible_devices.h"

namespace cann {
namespace {

constexpr size_t kMostDevices = 64;

struct Slot {
    std::atomic<bool> active{false};
    std::array<std::atomic<bool>, kMostDevices> reaches{};  // other devices' memory, once their peer access is enabled
};

std::array<Slot, kMostDevices> slots;
std::atomic<bool> initialised{false};
thread_local int32_t device_of_thread = 0;

int64_t count() { return static_cast<int64_t>(visible_devices().numbers.size()); }

bool exists(int64_t device) { return device >= 0 && device < count(); }

aclError no_device(int64_t device) {
    return fail(ACL_ERROR_RT_INVALID_DEVICEID, "device %lld does not exist: this process sees %lld of this machine's %u%s%s",
                static_cast<long long>(device), static_cast<long long>(count()), chip().devices,
                visible_devices().wrong.empty() ? "" : "; ", visible_devices().wrong.c_str());
}

// Keeps the memory of temporaries in this process. Else every large one is new pages, which the kernel has to zero,
// and a true-size step takes twice as long. One arena, as the others pass large requests on to the kernel.
void keep_freed_memory() {
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
}

}  // namespace

int32_t current_device() { return device_of_thread; }

int32_t machine_number(int32_t device) { return visible_devices().numbers.at(device); }

bool reaches(int32_t device, int32_t memory_of) {
    return exists(memory_of) && (device == memory_of || slots[device].reaches[memory_of]);
}

}  // namespace cann

using namespace cann;

CANN_API aclError aclInit(const char*) {
    if (chip().devices > kMostDevices) die("at most %zu devices can be emulated", kMostDevices);
    if (initialised.exchange(true)) return fail(ACL_ERROR_REPEAT_INITIALIZE, "repeat initialize");
    report_crashes();
    keep_freed_memory();
    return ACL_SUCCESS;
}

CANN_API aclError aclFinalize() {
    if (!initialised.exchange(false)) return fail(ACL_ERROR_REPEAT_FINALIZE, "repeat finalize");
    return ACL_SUCCESS;
}

CANN_API aclError aclrtGetDeviceCount(uint32_t* count) {
    const VisibleDevices& visible = visible_devices();
    if (!visible.wrong.empty()) return fail(ACL_ERROR_RT_NO_DEVICE, "%s", visible.wrong.c_str());
    *count = static_cast<uint32_t>(visible.numbers.size());
    return ACL_SUCCESS;
}

CANN_API aclError aclrtSetDevice(int32_t device) {
    if (!exists(device)) return no_device(device);
    device_of_thread = device;
    slots[device].active = true;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtGetDevice(int32_t* device) {
    // torch_npu relies on the error to learn that no device has been set up yet.
    if (!slots[device_of_thread].active) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device is set on this thread");
    *device = device_of_thread;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtResetDevice(int32_t device) {
    if (!exists(device)) return no_device(device);
    synchronize_device(device);
    races::wait_on_host(device);
    slots[device].active = false;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtSynchronizeDeviceWithTimeout(int32_t) {
    synchronize_device(current_device());
    races::wait_on_host(current_device());
    trace::sync("device", current_device(), -1);
    return fault();
}

CANN_API aclError aclrtSynchronizeDevice() { return aclrtSynchronizeDeviceWithTimeout(-1); }

CANN_API aclError aclrtGetCurrentContext(aclrtContext* context) {
    *context = &slots[current_device()];
    return ACL_SUCCESS;
}

CANN_API aclError aclrtSetCurrentContext(aclrtContext context) {
    const auto* slot = static_cast<Slot*>(context);
    if (slot < slots.begin() || slot >= slots.begin() + count()) {
        return fail(ACL_ERROR_RT_CONTEXT_NULL, "context %p does not exist", context);
    }
    device_of_thread = static_cast<int32_t>(slot - slots.begin());
    return ACL_SUCCESS;
}

CANN_API aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
    if (!exists(device)) return no_device(device);
    if (flags != nullptr) *flags = 0;
    *active = slots[device].active ? 1 : 0;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t* const logic) {
    if (!exists(user)) return no_device(user);
    *logic = machine_number(user);
    return ACL_SUCCESS;
}

CANN_API aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t device, int32_t peer) {
    if (!exists(device)) return no_device(device);
    if (!exists(peer)) return no_device(peer);
    *can = device != peer && chip().peer_access;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t) {
    if (!exists(peer)) return no_device(peer);
    if (!chip().peer_access) return fail(ACL_ERROR_FEATURE_UNSUPPORTED, "%s has no peer access", chip().soc.c_str());
    slots[device_of_thread].reaches[peer] = true;
    return ACL_SUCCESS;
}

CANN_API aclError aclrtDeviceGetBareTgid(int32_t* process) {
    *process = getpid();
    return ACL_SUCCESS;
}

CANN_API aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t* value) {
    if (!exists(device)) return no_device(device);
    switch (info) {
        case ACL_DEVICE_INFO_AI_CORE_NUM: *value = chip().cube_cores; return ACL_SUCCESS;
        case ACL_DEVICE_INFO_VECTOR_CORE_NUM: *value = chip().vector_cores; return ACL_SUCCESS;
        case ACL_DEVICE_INFO_L2_SIZE: *value = chip().l2_bytes; return ACL_SUCCESS;
        default: return fail(ACL_ERROR_INVALID_PARAM, "device capability %d is not known", static_cast<int>(info));
    }
}

CANN_API aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr attribute, int64_t* value) {
    if (!exists(device)) return no_device(device);
    switch (static_cast<int>(attribute)) {
        case ACL_DEV_ATTR_AICORE_CORE_NUM:
        case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = chip().cube_cores; return ACL_SUCCESS;
        case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = chip().vector_cores; return ACL_SUCCESS;
        case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = static_cast<int64_t>(chip().memory); return ACL_SUCCESS;
        case ACL_DEV_ATTR_L2_CACHE_SIZE: *value = chip().l2_bytes; return ACL_SUCCESS;
        case ACL_DEV_ATTR_IS_VIRTUAL: *value = 0; return ACL_SUCCESS;
        case ACL_DEV_ATTR_PHY_CHIP_ID: *value = machine_number(static_cast<int32_t>(device)); return ACL_SUCCESS;
        default:
            return fail(ACL_ERROR_API_NOT_SUPPORT, "device attribute %d is not emulated", static_cast<int>(attribute));
    }
}
