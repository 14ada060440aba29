// AIPP: what a chip does to the bytes of a picture before the model sees them (--insert_op_conf).
#pragma once

#include <map>
#include <string>
#include <vector>

#include "graph/ir.h"

namespace cann::offline {

// One aipp_op of the configuration: its numbers by name, and the format of the picture.
struct Aipp {
    std::string image;  // "RGB888_U8"
    std::map<std::string, double> values;
    int64_t input = 0;  // related_input_rank

    double value(const char* name, double otherwise = 0) const;
};

// Reads the configuration (AIPP/config_file_template.md of hicann/ge). Throws Refusal.
std::vector<Aipp> parse_aipp(const std::string& path);

// Puts an Aipp operator behind the Data nodes that are meant, which become uint8 pictures [N, H, W, C], and says so in
// `sizes`, the sizes of all inputs. Throws Refusal.
void insert_aipp(graph::Graph& graph, const std::vector<Aipp>& operations, std::vector<graph::Ints>& sizes);

// How often the height of a picture is stored: 1.5 for YUV420SP_U8, whose colours lie below; 1 for others.
double stored_heights(const std::string& image);

}  // namespace cann::offline
