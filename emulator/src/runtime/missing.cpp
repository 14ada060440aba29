// Where every generated stub ends: the process stops and says which CANN function it needed. A stub that returned
// anything would let a program continue with wrong results.
#include <cxxabi.h>

#include "runtime/runtime.h"

extern "C" [[noreturn]] void cann_emulator_missing(const char* symbol) {
    int status = 0;
    const char* readable = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    cann::die("the CANN function `%s` is not emulated; see 'Adding a function' in emulator/README.md",
              status == 0 ? readable : symbol);
}
