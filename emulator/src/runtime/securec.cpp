// The bounds-checked C functions that libc_sec gives on a CANN machine; torchair links to them.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "runtime/runtime.h"

CANN_API int vsnprintf_s(char* target, size_t size, size_t count, const char* format, va_list arguments) {
    const int written = std::vsnprintf(target, count < size ? count + 1 : size, format, arguments);
    return written < 0 || static_cast<size_t>(written) > count || static_cast<size_t>(written) >= size ? -1 : written;
}

CANN_API int snprintf_s(char* target, size_t size, size_t count, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int written = vsnprintf_s(target, size, count, format, arguments);
    va_end(arguments);
    return written;
}

CANN_API int strcpy_s(char* target, size_t size, const char* source) {
    const size_t length = std::strlen(source) + 1;
    if (length > size) return 34;  // ERANGE, as the standard's annex K leaves to the implementation
    std::memcpy(target, source, length);
    return 0;
}
