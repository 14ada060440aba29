// The memory plan: first fit by size, over the steps between which a value is needed.
#include <algorithm>

#include "graph/compiler.h"

namespace cann::graph {
namespace {

constexpr int64_t kAlignment = 512;  // of device memory, as the chips' caching allocator rounds

struct Block {
    int value;
    int64_t first, last;  // steps
    int64_t size, offset = 0;
};

bool together(const Block& a, const Block& b) { return a.first <= b.last && b.first <= a.last; }

// The lowest place that no block needed at the same time takes.
int64_t find_place(const Block& block, const std::vector<Block>& placed) {
    std::vector<const Block*> others;
    for (const Block& other : placed) {
        if (together(block, other)) others.push_back(&other);
    }
    std::sort(others.begin(), others.end(), [](const Block* a, const Block* b) { return a->offset < b->offset; });
    int64_t offset = 0;
    for (const Block* other : others) {
        if (offset + block.size <= other->offset) break;
        offset = std::max(offset, other->offset + other->size);
    }
    return offset;
}

}  // namespace

void plan_memory(Compiled& compiled) {
    std::vector<Block> blocks(compiled.values.size(), Block{-1, 0, 0, 0});
    for (size_t step = 0; step < compiled.steps.size(); ++step) {
        const auto use = [&](int index) {
            if (index < 0) return;
            const int memory = compiled.values[index].memory;
            const Value& value = compiled.values[memory];
            if (value.place != Value::Place::kFeature || value.output >= 0) return;
            Block& block = blocks[memory];
            const bool is_there_before = value.input >= 0;
            if (block.value < 0) block = {memory, is_there_before ? 0 : static_cast<int64_t>(step), 0, 0};
            block.last = static_cast<int64_t>(step);
            block.size = (static_cast<int64_t>(value.bytes()) + kAlignment - 1) / kAlignment * kAlignment;
        };
        for (int index : compiled.steps[step].outputs) use(index);
        for (int index : compiled.steps[step].inputs) use(index);
    }
    // An output that is handed out twice is copied when all steps have run.
    for (int output : compiled.outputs) {
        Block& block = blocks[compiled.values[output].memory];
        if (block.value >= 0) block.last = static_cast<int64_t>(compiled.steps.size());
    }

    std::erase_if(blocks, [](const Block& block) { return block.value < 0; });
    std::stable_sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) { return a.size > b.size; });
    std::vector<Block> placed;
    int64_t end = 0;
    for (Block& block : blocks) {
        block.offset = find_place(block, placed);
        compiled.values[block.value].offset = block.offset;
        end = std::max(end, block.offset + block.size);
        placed.push_back(block);
    }
    compiled.feature_bytes = static_cast<size_t>(end);
}

}  // namespace cann::graph
