// The trace that `emulator run --trace FILE` writes: one JSON object a line, for launches, copies and host syncs.
#pragma once

#include <string>

namespace cann::trace {

bool enabled();
void write(const std::string& json);  // one object, without the newline
void sync(const char* what, int device, int stream);
void copy(const char* kind, size_t bytes, int device, int stream);

}  // namespace cann::trace
