// Runs compiled graphs.
#pragma once

#include "graph/compiler.h"

namespace cann {
class Stream;
}

namespace cann::graph {

// What changes from run to run.
struct Memory {
    char* constants = nullptr;
    char* features = nullptr;
    std::vector<TensorArgument> inputs, outputs;
    std::map<int, std::vector<char>> from_host;  // what inputs in host memory held at the call
};

// Writes the graph's constants to their memory.
void load_constants(const Compiled& compiled, char* memory);

// Tells the check for races what a run will do.
void check_races(const Compiled& compiled, const Memory& memory, const Stream& stream, bool loads_constants);

// Runs all steps; 0, or the code of the first error, which has been reported.
int run(const Compiled& compiled, const Memory& memory, const Stream& stream);

}  // namespace cann::graph
