#include "hccl/collectives.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <tuple>

#include "ops/numerics.h"
#include "ops/tensor.h"

namespace cann::hccl {
namespace {

[[noreturn]] void fail_inconsistent(const char* tag, const char* parameter, uint64_t local, uint64_t remote) {
    throw Failure(HCCL_E_PARA, std::string("EI0005: The arguments for collective communication are inconsistent "
                                           "between ranks: tag [") +
                                   tag + "], parameter [" + parameter + "], local [" + std::to_string(local) +
                                   "], remote [" + std::to_string(remote) + "]");
}

void check_signature(const char* tag, const Signature& local, const Signature& remote) {
    const std::array<std::tuple<const char*, uint64_t, uint64_t>, 5> parameters{{
        {"operator", local.operation, remote.operation},
        {"dataType", local.data_type, remote.data_type},
        {"op", local.reduction, remote.reduction},
        {"root", local.root, remote.root},
        {"count", local.count, remote.count},
    }};
    for (const auto& [name, here, there] : parameters) {
        if (here != there) fail_inconsistent(tag, name, here, there);
    }
}

at::Tensor combine(const at::Tensor& left, const at::Tensor& right, int32_t reduction) {
    switch (reduction) {
        case HCCL_REDUCE_SUM: return left + right;
        case HCCL_REDUCE_PROD: return left * right;
        case HCCL_REDUCE_MAX: return at::maximum(left, right);
        case HCCL_REDUCE_MIN: return at::minimum(left, right);
        default: throw Failure(HCCL_E_PARA, "the reduction " + std::to_string(reduction) + " does not exist");
    }
}

}  // namespace

at::ScalarType from_hccl(HcclDataType type) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8: return at::kChar;
        case HCCL_DATA_TYPE_INT16: return at::kShort;
        case HCCL_DATA_TYPE_INT32: return at::kInt;
        case HCCL_DATA_TYPE_FP16: return at::kHalf;
        case HCCL_DATA_TYPE_FP32: return at::kFloat;
        case HCCL_DATA_TYPE_INT64: return at::kLong;
        case HCCL_DATA_TYPE_UINT64: return at::kUInt64;
        case HCCL_DATA_TYPE_UINT8: return at::kByte;
        case HCCL_DATA_TYPE_UINT16: return at::kUInt16;
        case HCCL_DATA_TYPE_UINT32: return at::kUInt32;
        case HCCL_DATA_TYPE_FP64: return at::kDouble;
        case HCCL_DATA_TYPE_BFP16: return at::kBFloat16;
        case HCCL_DATA_TYPE_FP8E4M3: return at::kFloat8_e4m3fn;
        case HCCL_DATA_TYPE_FP8E5M2: return at::kFloat8_e5m2;
        default: throw Failure(HCCL_E_NOT_SUPPORT, "the data type " + std::to_string(type) + " is not emulated");
    }
}

Layout Layout::even(uint64_t count, uint32_t ranks) {
    Layout layout;
    for (uint32_t rank = 0; rank < ranks; ++rank) {
        layout.counts.push_back(count);
        layout.offsets.push_back(rank * count);
    }
    return layout;
}

uint64_t Layout::extent() const {
    uint64_t end = 0;
    for (size_t i = 0; i < counts.size(); ++i) end = std::max(end, offsets[i] + counts[i]);
    return end;
}

at::Tensor Collective::elements(const void* memory, uint64_t count, uint64_t offset) const {
    const char* start = static_cast<const char*>(memory) + offset * c10::elementSize(dtype);
    return at::from_blob(const_cast<char*>(start), {static_cast<int64_t>(count)}, dtype);
}

Collective::Pieces Collective::everyone(const at::Tensor& piece) const {
    return Pieces(communicator.self.ranks, piece);
}

Collective::Pieces Collective::slices(const void* memory, const Layout& layout) const {
    Pieces pieces;
    for (size_t i = 0; i < layout.counts.size(); ++i) {
        pieces.push_back(elements(memory, layout.counts[i], layout.offsets[i]));
    }
    return pieces;
}

at::Tensor Collective::receive_piece(uint32_t rank, const at::Tensor& expected) const {
    Message message = communicator.mesh.receive(rank, communicator.execute_timeout);
    check_signature(name, signature, message.signature);
    if (message.content.size() != expected.nbytes()) {
        fail_inconsistent(name, "bytes", expected.nbytes(), message.content.size());
    }
    auto content = std::make_shared<std::vector<char>>(std::move(message.content));
    return at::from_blob(content->data(), expected.sizes(), [content](void*) mutable { content.reset(); }, dtype);
}

void Collective::exchange(const Pieces& outgoing, Pieces& incoming) const {
    const uint32_t self = communicator.self.rank;
    const uint32_t ranks = communicator.self.ranks;
    for (uint32_t step = 1; step < ranks; ++step) {  // each rank starts with another one
        const uint32_t to = (self + step) % ranks;
        if (!outgoing[to]) continue;
        communicator.mesh.send(to, signature, outgoing[to]->data_ptr(), outgoing[to]->nbytes());
    }
    for (uint32_t from = 0; from < ranks; ++from) {
        if (!incoming[from]) continue;
        incoming[from] = from == self ? outgoing[self] : receive_piece(from, *incoming[from]);
    }
}

void Collective::collect(const Pieces& outgoing, void* receive, const Layout& layout) const {
    const Pieces targets = slices(receive, layout);
    Pieces pieces = targets;
    exchange(outgoing, pieces);
    for (size_t i = 0; i < pieces.size(); ++i) {
        std::memmove(targets[i]->data_ptr(), pieces[i]->data_ptr(), targets[i]->nbytes());
    }
}

// 16-bit sums are float32 and rounded once.
void Collective::put_reduced(const Pieces& pieces, void* receive) const {
    at::Tensor result = up(*pieces[0]);
    for (size_t i = 1; i < pieces.size(); ++i) result = combine(result, up(*pieces[i]), signature.reduction);
    put(elements(receive, result.numel()), result.is_alias_of(*pieces[0]) ? result.clone() : result);
}

void Collective::all_gather(const void* send, uint64_t count, void* receive, const Layout& layout) const {
    collect(everyone(elements(send, count)), receive, layout);
}

void Collective::all_reduce(const void* send, void* receive, uint64_t count) const {
    const Pieces outgoing = everyone(elements(send, count));
    Pieces pieces = outgoing;
    exchange(outgoing, pieces);
    put_reduced(pieces, receive);
}

void Collective::reduce(const void* send, void* receive, uint64_t count) const {
    const Pieces own = everyone(elements(send, count));
    const Pieces nothing(own.size());
    const bool is_root = communicator.self.rank == signature.root;
    Pieces outgoing(own.size()), pieces = is_root ? own : nothing;
    outgoing[signature.root] = own[0];
    exchange(outgoing, pieces);
    if (is_root) put_reduced(pieces, receive);
}

void Collective::reduce_scatter(const void* send, const Layout& layout, void* receive) const {
    const Pieces outgoing = slices(send, layout);
    Pieces pieces = everyone(*outgoing[communicator.self.rank]);
    exchange(outgoing, pieces);
    put_reduced(pieces, receive);
}

void Collective::broadcast(void* buffer, uint64_t count) const {
    if (communicator.self.rank != signature.root) return receive(buffer, count, signature.root);
    Pieces nothing(communicator.self.ranks);
    exchange(everyone(elements(buffer, count)), nothing);
}

void Collective::scatter(const void* send, void* receive, uint64_t count) const {
    if (communicator.self.rank != signature.root) return this->receive(receive, count, signature.root);
    const Pieces outgoing = slices(send, Layout::even(count, communicator.self.ranks));
    Pieces nothing(communicator.self.ranks);
    exchange(outgoing, nothing);
    const at::Tensor& own = *outgoing[communicator.self.rank];
    std::memmove(receive, own.data_ptr(), own.nbytes());
}

void Collective::all_to_all(const void* send, const Layout& sent, void* receive, const Layout& received) const {
    collect(slices(send, sent), receive, received);
}

void Collective::send(const void* buffer, uint64_t count, uint32_t to) const {
    const at::Tensor piece = elements(buffer, count);
    communicator.mesh.send(to, signature, piece.data_ptr(), piece.nbytes());
}

void Collective::receive(void* buffer, uint64_t count, uint32_t from) const {
    const at::Tensor target = elements(buffer, count);
    std::memcpy(target.data_ptr(), receive_piece(from, target).data_ptr(), target.nbytes());
}

}  // namespace cann::hccl
