// What the kernels of backward passes have in common.
#pragma once

#include <array>
#include <tuple>

#include "ops/operator.h"

namespace cann {

// Of input, weight and bias; undefined where nobody asks for one.
using Gradients = std::tuple<Tensor, Tensor, Tensor>;
using Asked = std::array<bool, 3>;

inline Asked asked(const Bools& mask) { return {mask.at(0), mask.at(1), mask.at(2)}; }

inline void put_gradients(const Gradients& values, const Tensor& of_input, const Tensor& of_weight, const Tensor& of_bias) {
    const auto write = [](const Tensor& out, const Tensor& value) {
        if (value.defined()) put_if_given(out, value);
    };
    write(of_input, std::get<0>(values));
    write(of_weight, std::get<1>(values));
    write(of_bias, std::get<2>(values));
}

}  // namespace cann
