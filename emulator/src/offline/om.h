// An offline model: compiled graphs, one for each profile of shapes, over weights that all of them share.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "graph/compiler.h"

namespace cann::offline {

using graph::Ints;

enum class Dynamic : uint8_t { kNone, kBatch, kImage, kDims };  // what tells the profiles apart

// One input or output of the model.
struct Port {
    std::string name;
    at::ScalarType dtype = at::kFloat;
    Ints sizes;  // as the program feeds it; -1 where the profiles differ
    int64_t format = 2;
    std::string image;  // of an input with static AIPP: its format, "RGB888_U8"
};

struct Profile {
    Ints gear;  // the batch, height and width, or all profiled dimensions of the inputs in order
    std::vector<Ints> inputs, outputs;
    graph::Compiled compiled;  // the constants' offsets are those in the shared weights
};

struct OfflineModel {
    std::string name, soc, version, precision, command_line;
    Dynamic dynamic = Dynamic::kNone;
    std::vector<Port> inputs, outputs;
    std::vector<Profile> profiles;
    size_t largest = 0;  // the profile with the most bytes of inputs, which runs unless another is chosen

    size_t feature_bytes() const;  // of the profile that needs most
    size_t input_bytes(size_t index) const;   // of the profile that needs most
    size_t output_bytes(size_t index) const;
};

size_t bytes_of(const Ints& sizes, at::ScalarType dtype);

// The file's content, and its parts. Files of CANN begin with "IMOD"; these never do, so that each side refuses the
// other's by name.
std::string serialize(OfflineModel& model);

// Where the parts of a file lie that is whole and of this chip; throws Unreadable for every other.
struct Parts {
    std::string_view description, weights;
    size_t weights_offset;
};
struct Unreadable : std::runtime_error {
    using std::runtime_error::runtime_error;
};
Parts check_parts(std::string_view file);
OfflineModel parse(const Parts& parts);

// Lets the constants of all profiles be read from the weights, wherever those have been loaded to.
void place_weights(OfflineModel& model, char* weights);

// Writes to a temporary name beside `path` and renames; throws std::runtime_error.
void write_whole(const std::string& path, std::string_view content);

}  // namespace cann::offline
