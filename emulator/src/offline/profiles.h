// The shapes of a model's inputs: --input_shape and the options that give it several profiles.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "offline/om.h"

namespace cann::offline {

struct ShapeOptions {
    std::string input_shape, input_shape_range, input_format;
    std::string dynamic_batch_size, dynamic_image_size, dynamic_dims;
};

struct Shapes {
    Dynamic dynamic = Dynamic::kNone;
    std::vector<std::pair<std::string, Ints>> given;  // by --input_shape; -1 where a profile fills in
    std::vector<Ints> gears;
};

// What can be told without the model. Throws Refusal with ATC's code (error_codes/*.md of hicann/ge).
Shapes parse_shapes(const ShapeOptions& options);

// The sizes of each Data node, in order, as given or as the model has them; -1 where a profile fills in. Throws Refusal.
std::vector<Ints> input_sizes(const graph::Graph& graph, const Shapes& shapes);

// The sizes of the inputs under one profile.
std::vector<Ints> fill(std::vector<Ints> sizes, Dynamic dynamic, const Ints& gear);

}  // namespace cann::offline
