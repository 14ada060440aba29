// The text of the last error, as a string of libstdc++'s first ABI: the part of torchair that asks for it is built so.
#undef _GLIBCXX_USE_CXX11_ABI
#define _GLIBCXX_USE_CXX11_ABI 0
#include <string>

extern "C" const char* cann_emulator_graph_error();

namespace ge {
__attribute__((visibility("default"))) std::string GEGetErrorMsg() { return cann_emulator_graph_error(); }
}  // namespace ge
