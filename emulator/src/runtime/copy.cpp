// Copies and fills. A kind that disagrees with where the addresses are is an error on a card (or garbage), so it is
// an error here; so are a destination that is too small and a copy between chips that have no link.
#include <cstring>

#include "races/check.h"
#include "runtime/memory.h"
#include "runtime/stream.h"
#include "runtime/trace.h"

namespace cann {
namespace {

struct Ends {
    bool source_on_device;
    bool target_on_device;
    const char* name;
};

Ends ends(aclrtMemcpyKind kind) {
    switch (kind) {
        case ACL_MEMCPY_HOST_TO_HOST: return {false, false, "host_to_host"};
        case ACL_MEMCPY_HOST_TO_DEVICE: return {false, true, "host_to_device"};
        case ACL_MEMCPY_HOST_TO_BUF_TO_DEVICE: return {false, true, "host_to_buf_to_device"};
        case ACL_MEMCPY_DEVICE_TO_HOST: return {true, false, "device_to_host"};
        default: return {true, true, "device_to_device"};
    }
}

aclError check(const void* target, size_t capacity, const void* source, size_t count, aclrtMemcpyKind kind) {
    if (count > capacity) {
        return fail(ACL_ERROR_INVALID_PARAM, "copy of %zu bytes to a destination of %zu", count, capacity);
    }
    const Region from = find_region(source);
    const Region to = find_region(target);
    if ((from && count > from.after(source)) || (to && count > to.after(target))) {
        return fail(ACL_ERROR_INVALID_PARAM, "copy of %zu bytes runs past the end of an allocation", count);
    }
    if (kind != ACL_MEMCPY_DEFAULT) {
        const Ends expected = ends(kind);
        if ((from && from.device != kHost) != expected.source_on_device ||
            (to && to.device != kHost) != expected.target_on_device) {
            return fail(ACL_ERROR_INVALID_PARAM,
                        "copy kind %s, but the source %p is %s memory and the target %p %s memory",
                        expected.name, source, from && from.device != kHost ? "device" : "host", target,
                        to && to.device != kHost ? "device" : "host");
        }
    }
    const bool between_chips = from && to && from.device != kHost && to.device != kHost && from.device != to.device;
    if (between_chips && !chip().peer_access) {
        return fail(ACL_ERROR_FEATURE_UNSUPPORTED, "%s cannot copy from device %d to device %d", chip().soc.c_str(),
                    from.device, to.device);
    }
    return ACL_SUCCESS;
}

aclError copy(void* target, size_t capacity, const void* source, size_t count, aclrtMemcpyKind kind, Stream* stream) {
    if (count == 0) return ACL_SUCCESS;
    if (const aclError error = fault()) return error;
    if (const aclError error = check(target, capacity, source, count, kind)) return error;
    trace::copy(ends(kind).name, count, stream->device, stream->id);
    if (races::enabled()) {
        races::launch(*stream, std::string("copy ") + ends(kind).name,
                      {{"its source", races::Footprint::of(source, count), false},
                       {"its target", races::Footprint::of(target, count), true}});
    }
    stream->submit([=] { std::memmove(target, source, count); });
    return ACL_SUCCESS;
}

aclError fill(void* target, size_t capacity, int32_t value, size_t count, Stream* stream) {
    const Region region = find_region(target);
    if (count > capacity || (region && count > region.after(target))) {
        return fail(ACL_ERROR_INVALID_PARAM, "memset of %zu bytes runs past the end of its destination", count);
    }
    if (count == 0) return ACL_SUCCESS;
    if (races::enabled()) races::launch(*stream, "memset", {{"its target", races::Footprint::of(target, count), true}});
    stream->submit([=] { std::memset(target, value, count); });
    return ACL_SUCCESS;
}

void finish(Stream& stream) {
    stream.synchronize();
    races::wait_on_host(stream);
}

aclError unknown_stream(aclrtStream stream) {
    return fail(ACL_ERROR_INVALID_RESOURCE_HANDLE, "stream %p does not exist", stream);
}

}  // namespace
}  // namespace cann

using namespace cann;

CANN_API aclError aclrtMemcpyAsync(void* target, size_t capacity, const void* source, size_t count,
                                   aclrtMemcpyKind kind, aclrtStream handle) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return unknown_stream(handle);
    const aclError error = copy(target, capacity, source, count, kind, stream);
    return error == ACL_SUCCESS ? error : fail_launch(error, recent_message());
}

// The synchronous forms do not wait for other streams, as on a card; they only return when their own copy is done.
CANN_API aclError aclrtMemcpy(void* target, size_t capacity, const void* source, size_t count, aclrtMemcpyKind kind) {
    Stream* stream = find_stream(nullptr);
    const aclError error = copy(target, capacity, source, count, kind, stream);
    if (error == ACL_SUCCESS) finish(*stream);
    return error;
}

CANN_API aclError aclrtMemsetAsync(void* target, size_t capacity, int32_t value, size_t count, aclrtStream handle) {
    Stream* stream = find_stream(handle);
    return stream == nullptr ? unknown_stream(handle) : fill(target, capacity, value, count, stream);
}

CANN_API aclError aclrtMemset(void* target, size_t capacity, int32_t value, size_t count) {
    Stream* stream = find_stream(nullptr);
    const aclError error = fill(target, capacity, value, count, stream);
    if (error == ACL_SUCCESS) finish(*stream);
    return error;
}
