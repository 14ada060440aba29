// What every part of the emulated runtime shares: the chip's description and the way to report an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

// Kernels and the runtime are built with hidden visibility; only what CANN exports is exported.
#define CANN_API extern "C" __attribute__((visibility("default")))

namespace cann {

// The chip to be emulated. `python -m emulator` reads the profile (TOML) and hands it over in the environment,
// so that child processes (torchrun, Ray workers) see the same chip and C++ needs no TOML parser.
struct Chip {
    std::string soc;           // CANN_EMULATOR_SOC
    std::string version;       // CANN_EMULATOR_VERSION: the CANN release to report
    uint32_t devices;          // CANN_EMULATOR_DEVICES: of the machine; a process may see fewer, see visible_devices.h
    size_t memory;             // CANN_EMULATOR_MEMORY: bytes per device
    int64_t cube_cores;        // CANN_EMULATOR_CUBE_CORES
    int64_t vector_cores;      // CANN_EMULATOR_VECTOR_CORES
    int64_t l2_bytes;          // CANN_EMULATOR_L2
    bool inf_nan;              // CANN_EMULATOR_INF_NAN: IEEE overflow (910B) or saturation (310P)
    bool peer_access;          // CANN_EMULATOR_PEER_ACCESS: device-to-device copies between chips
};

const Chip& chip();

// Keeps the message for aclGetRecentErrMsg of this thread and returns `code`, so that callers `return fail(...)`.
aclError fail(aclError code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The same for a failed launch (an operator, an asynchronous copy). torch_npu launches from a queue thread, raises the
// first error and silently drops every launch after it; a program that catches the error would go on with zeros. So
// an error on such a thread stays: fault() returns it from then on, and copies and synchronisations report it. The same
// holds for threads that run a stream, which call run_behind_the_program().
aclError fail_launch(aclError code, const std::string& message);
aclError fault();
void run_behind_the_program();

// A launch that fails with an error code of its own; others are inner errors of the operator.
struct Failure : std::runtime_error {
    Failure(int code, const std::string& message) : std::runtime_error(message), code(code) {}
    int code;
};

// The message of this thread's latest fail().
std::string recent_message();

// Lets a segmentation fault show the last error. torch_npu (2.13, OpCommandImpl::Run) leaves Python's lock released when
// an operator fails while its caller holds it, as `x[index] = value` does, and torch then crashes in raising the error.
void report_crashes();

// For what can never be right to continue after: names the reason on stderr and aborts.
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The device of the calling thread (device 0 until aclrtSetDevice, as in CANN).
int32_t current_device();

// The machine's number of a device that this process sees as `device`.
int32_t machine_number(int32_t device);

}  // namespace cann
