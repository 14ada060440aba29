// What a communicator does. A collective is an exchange: each rank gives every other rank a piece, or nothing, and then
// makes its result of the pieces that it got. Reductions take them in the order of the ranks, so that all ranks get the
// same bits.
#pragma once

#include <ATen/ATen.h>

#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "hccl/transport.h"
#include "third_party/hccl/inc/hccl/hccl_types.h"

namespace cann::hccl {

struct Communicator {
    Communicator(const std::string& id, const std::string& name, const Member& self, Seconds connect, Seconds execute)
        : name(name), self(self), execute_timeout(execute), mesh(id, self, connect) {}

    const std::string name;
    const Member self;
    const Seconds execute_timeout;
    Mesh mesh;

    // The first collective that failed; nothing runs after it.
    std::mutex guard;
    int error = HCCL_SUCCESS;
    std::string reason;
};

// Pieces in elements, by rank, as HCCL's functions with a V take them.
struct Layout {
    std::vector<uint64_t> counts, offsets;

    static Layout even(uint64_t count, uint32_t ranks);
    uint64_t extent() const;  // elements from the start to the end of the last piece
};

at::ScalarType from_hccl(HcclDataType type);  // throws for a type that torch does not have

// A collective in the making: what its ranks must agree on, and its memory.
struct Collective {
    const char* name;
    Communicator& communicator;
    Signature signature;
    at::ScalarType dtype;

    void all_gather(const void* send, uint64_t count, void* receive, const Layout& layout) const;
    void all_reduce(const void* send, void* receive, uint64_t count) const;
    void reduce(const void* send, void* receive, uint64_t count) const;
    void reduce_scatter(const void* send, const Layout& layout, void* receive) const;
    void broadcast(void* buffer, uint64_t count) const;
    void scatter(const void* send, void* receive, uint64_t count) const;
    void all_to_all(const void* send, const Layout& sent, void* receive, const Layout& received) const;
    void send(const void* buffer, uint64_t count, uint32_t to) const;
    void receive(void* buffer, uint64_t count, uint32_t from) const;

private:
    using Pieces = std::vector<std::optional<at::Tensor>>;  // by rank

    // A view of memory.
    at::Tensor elements(const void* memory, uint64_t count, uint64_t offset = 0) const;
    Pieces everyone(const at::Tensor& piece) const;
    Pieces slices(const void* memory, const Layout& layout) const;
    // Sends `outgoing`, and fills `incoming` with what came; the own piece goes from one to the other.
    void exchange(const Pieces& outgoing, Pieces& incoming) const;
    void collect(const Pieces& outgoing, void* receive, const Layout& layout) const;
    at::Tensor receive_piece(uint32_t rank, const at::Tensor& expected) const;
    void put_reduced(const Pieces& pieces, void* receive) const;
};

}  // namespace cann::hccl
