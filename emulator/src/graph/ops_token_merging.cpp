// Token merging. What the operators compute is from the test of npu_tome_merge in Ascend/op-plugin, and from how
// Huawei's stable_diffusion sample uses both.
#include "graph/operation.h"

namespace cann::graph {
namespace {

constexpr int64_t kCopies = 8;  // the kernel's cores each sum into a copy of their own

struct Sizes {
    int64_t sources, destinations, merged, kept;
};

// torchair sets the rate under other names than the operators declare, so that they would always see their default.
Sizes sizes_of(const Operands& x, const char* rate, int64_t sources, int64_t destinations) {
    TORCH_CHECK(x.real(rate, 0.5) == 0.5, "only the default rate of 0.5 reaches the operator, got ", x.real(rate, 0.5));
    const int64_t merged = (sources + destinations) / 2;
    return {sources, destinations, merged, sources - merged};
}

// Of sources, destinations, the order of the sources and the destination of each: the sources that remain, and sums
// and numbers of what each destination got. Sums are in float16, as in the test.
Results merged(const Operands& x) {
    const Tensor sources = x[0], destinations = x[1], order = x[2], nearest = x[3];
    const Sizes sizes = sizes_of(x, "topRate", sources.size(1), destinations.size(1));
    const int64_t batch = sources.size(0), channels = sources.size(2);
    const auto options = sources.options();
    const Tensor sums = at::zeros({batch, kCopies, sizes.destinations, channels}, options);
    const Tensor counts = at::zeros({batch, kCopies, sizes.destinations}, options.dtype(at::kFloat));
    if (x.compiling()) {
        return {at::empty({batch, sizes.kept, channels}, options), sums, as(at::kFloat, counts)};
    }
    sums.select(1, 0).copy_(destinations);
    counts.select(1, 0).fill_(1);
    const int64_t share = sizes.merged / kCopies;  // what is left over is lost
    std::vector<Tensor> kept;
    for (int64_t sample = 0; sample < batch; ++sample) {
        for (int64_t copy = 0; copy < kCopies; ++copy) {
            const Tensor rows = order[sample].narrow(0, copy * share, share), to = nearest[sample].index_select(0, rows);
            sums[sample][copy].index_add_(0, to, sources[sample].index_select(0, rows));
            counts[sample][copy].index_add_(0, to, at::ones({share}));
        }
        kept.push_back(sources[sample].index_select(0, order[sample].narrow(0, sizes.merged, sizes.kept)));
    }
    return {at::stack(kept), sums, as(at::kFloat, counts)};
}

Tensor unmerged(const Operands& x) {
    const Tensor attended = x[0], sources = x[1], destinations = x[2], order = x[3], nearest = x[4];
    const Sizes sizes = sizes_of(x, "top_r_rate", sources.size(1), destinations.size(1));
    const int64_t batch = attended.size(0), channels = attended.size(2);
    const Tensor out = at::empty({batch, sizes.sources + sizes.destinations, channels}, attended.options());
    if (x.compiling()) return out;
    const Tensor merging = order.narrow(1, 0, sizes.merged);
    const Tensor tokens = at::cat({sources.gather(1, order), destinations}, 1);
    const Tensor rows = at::cat({sizes.kept + nearest.gather(1, merging),
                                 at::arange(sizes.kept).expand({batch, -1}),
                                 at::arange(sizes.kept, attended.size(1)).expand({batch, -1})},
                                1);
    const auto whole = [&](const Tensor& index) { return index.unsqueeze(2).expand({-1, -1, channels}); };
    return out.scatter_(1, whole(tokens), attended.gather(1, whole(rows)));
}

}  // namespace
}  // namespace cann::graph

GE(TomeMerge, merged(x))
GE_MOVES(TomeUnmerge, unmerged(x))
