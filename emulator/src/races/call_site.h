// Where a program is, as Python tells it.
#pragma once

#include <string>

namespace cann::races {

// "file.py:12": the innermost line of this thread that is not of torch or torch_npu; empty where Python does not run.
// Must not be called with a lock that a thread may want while it has Python's.
std::string call_site();

// Whether Python knows this thread; true where there is no Python.
bool is_thread_of_program();

}  // namespace cann::races
