// Random numbers: Philox4x32-10 (Salmon et al., SC 2011) with torch_npu's (seed, offset) as key and counter, so that a
// draw depends on neither chip nor dtype. The 310P's AI CPU kernels use the same generator; the hardware engine of the
// 910B is not public, and its numbers are others.
#include <ATen/Dispatch.h>
#include <ATen/native/DistributionTemplates.h>

#include <array>
#include <cmath>
#include <numbers>

#include "ops/operator.h"
#include "ops/shared.h"

namespace cann {
namespace {

using Block = std::array<uint32_t, 4>;

Block philox(uint64_t seed, uint64_t offset, uint64_t index) {
    constexpr uint32_t kMultiply0 = 0xD2511F53, kMultiply1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
    Block c{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), static_cast<uint32_t>(offset),
            static_cast<uint32_t>(offset >> 32)};
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{kMultiply0} * c[0], product1 = uint64_t{kMultiply1} * c[2];
        c = {static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(product1),
             static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(product0)};
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return c;
}

float unit(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }  // [0, 1)

}  // namespace

Tensor uniform(at::IntArrayRef shape, uint64_t seed, uint64_t offset) {
    Tensor out = at::empty(shape, at::kFloat);
    float* values = out.data_ptr<float>();
    const int64_t count = out.numel();
    for (int64_t i = 0; i < count; i += 4) {
        const Block bits = philox(seed, offset, i / 4);
        for (int64_t j = 0; j < std::min<int64_t>(4, count - i); ++j) values[i + j] = unit(bits[j]);
    }
    return out;
}

// By Box and Muller.
Tensor normal(at::IntArrayRef shape, uint64_t seed, uint64_t offset) {
    Tensor out = at::empty(shape, at::kFloat);
    float* values = out.data_ptr<float>();
    const int64_t count = out.numel();
    for (int64_t i = 0; i < count; i += 4) {
        const Block bits = philox(seed, offset, i / 4);
        float block[4];
        for (int pair = 0; pair < 4; pair += 2) {
            const float radius = std::sqrt(-2 * std::log(1 - unit(bits[pair])));
            const float angle = 2 * std::numbers::pi_v<float> * unit(bits[pair + 1]);
            block[pair] = radius * std::cos(angle);
            block[pair + 1] = radius * std::sin(angle);
        }
        std::copy_n(block, std::min<int64_t>(4, count - i), values + i);
    }
    return out;
}

Tensor dropout_mask(int64_t bytes, double keep, uint64_t seed, uint64_t offset) {
    return pack_bits(uniform({bytes * 8}, seed, offset) < keep);
}

Tensor drop_out(const Tensor& x, const Tensor& mask, double keep) {
    return keep <= 0 ? at::zeros_like(x) : up(x) * unpack_bits(mask, x.sizes()) / keep;
}

namespace {

// Whole numbers from `from` up to, and without, `to`, for a tensor of `dtype`.
Tensor integers(at::IntArrayRef shape, ScalarType dtype, int64_t from, int64_t to, uint64_t seed, uint64_t offset) {
    if (at::isFloatingType(dtype)) {
        // As in torch and CANN: no bound that rounding to `dtype` would reach or pass.
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "random_", [&] {
            from = at::native::templates::update_from<scalar_t>(from);
            to = at::native::templates::update_to<scalar_t>(to);
        });
    }
    const uint64_t count = static_cast<uint64_t>(to) - static_cast<uint64_t>(from);
    const Tensor drawn = uniform(shape, seed, offset).to(at::kDouble) * static_cast<double>(count);
    return drawn.floor().clamp_max(static_cast<double>(count - 1)).to(at::kUInt64).view(at::kLong) + from;
}

Tensor permutation(int64_t n, uint64_t seed, uint64_t offset) { return at::argsort(uniform({n}, seed, offset)); }

// Without replacement: the largest of p^(1/u) (Efraimidis and Spirakis); with: by the cumulative distribution.
Tensor multinomial(const Tensor& weights, int64_t samples, bool replacement, uint64_t seed, uint64_t offset) {
    const Tensor p = up(weights);
    if (!replacement) {
        const Tensor keys = at::log(uniform(p.sizes(), seed, offset).clamp_min(1e-30)) / p;
        return std::get<1>(at::topk(at::where(p > 0, keys, -INFINITY), samples, -1));
    }
    const Tensor cumulative = at::cumsum(p / p.sum(-1, true), -1);
    Ints shape = p.sizes().vec();
    shape.back() = samples;
    return at::searchsorted(cumulative.contiguous(), uniform(shape, seed, offset), false, true).clamp_max(p.size(-1) - 1);
}

}  // namespace
}  // namespace cann

INPLACE(Normal, (Tensor self, float mean, float std, int64_t seed, int64_t offset), normal(self.sizes(), seed, offset) * std + mean)
FUNCTION(NormalTensorTensor, (Tensor mean, Tensor std, int64_t seed, int64_t offset), normal(out.sizes(), seed, offset) * std + mean)
FUNCTION(NormalTensorFloat, (Tensor mean, float std, int64_t seed, int64_t offset), normal(out.sizes(), seed, offset) * std + mean)
FUNCTION(NormalFloatTensor, (float mean, Tensor std, int64_t seed, int64_t offset), normal(out.sizes(), seed, offset) * std + mean)
FUNCTION(NormalFloatFloat, (float mean, float std, int64_t seed, int64_t offset), normal(out.sizes(), seed, offset) * std + mean)
ACLNN(InplaceUniform, (OutTensor self, double from, double to, uint64_t seed, uint64_t offset) {
    put(self, uniform(self.sizes(), seed, offset) * (to - from) + from);
    self.masked_fill_(self == to, from);  // `to` is excluded, but 16 bits may round to it
})
INPLACE(Random, (Tensor self, int64_t from, int64_t to, int64_t seed, int64_t offset), integers(self.sizes(), self.scalar_type(), from, to, seed, offset))
INPLACE(Bernoulli, (Tensor self, Scalar p, int64_t seed, int64_t offset), uniform(self.sizes(), seed, offset) < p)
INPLACE(BernoulliTensor, (Tensor self, Tensor p, int64_t seed, int64_t offset), uniform(self.sizes(), seed, offset) < p)
FUNCTION(Randperm, (int64_t n, int64_t seed, int64_t offset), permutation(n, seed, offset))
FUNCTION(Multinomial, (Tensor self, int64_t samples, bool replacement, int64_t seed, int64_t offset),
         multinomial(self, samples, replacement, seed, offset))
ACLNN(SimThreadExponential, (OutTensor self, int64_t count, double lambda, int64_t seed, int64_t offset) {
    put(self, -at::log1p(-uniform(self.sizes(), seed, offset)) / lambda);
})

// The draw of a mask is that of Bernoulli(1 - prob).
ACLNN(DropoutGenMaskV2, (Ints shape, double prob, int64_t seed, int64_t offset, ScalarType prob_dtype, OutTensor out) {
    move(out, dropout_mask(out.numel(), 1 - prob, seed, offset));
})
ACLNN(DropoutDoMask, (Tensor self, Tensor mask, double prob, OutTensor out) { put(out, drop_out(self, mask, 1 - prob)); })
