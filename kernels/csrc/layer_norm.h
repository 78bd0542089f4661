// LayerNorm of one row, forward and backward. The row stays in the first-level cache between the passes.
#pragma once

#include <cmath>

#include "simd.h"

namespace mage_fast {

struct Moments {
  float mean, rstd;
};

// Of a row whose elements add up to `total`. The variance has a pass of its own over the deviations, so a
// mean that is large beside it costs no accuracy.
template <class T>
inline Moments moments(const T* row, int64_t features, Floats total, float eps) {
  const float mean = sum(total) / features;
  const Floats squares = sum_vectors(features, [&](int64_t first, auto count) {
    const Floats deviation = load(row + first, count, mean) - mean;
    return deviation * deviation;
  });
  return {mean, 1.0f / std::sqrt(sum(squares) / features + eps)};
}

// The gradient of y = n * weight + bias, n = (s - mean) * rstd, of one row: adds that of weight and bias to
// theirs and calls use(first, d loss / d s, count) for each vector. `row` and `grad` are functions of
// (first, count) that give s and d loss / d y, the latter 0 past the row's end; `scratch` has room for a row.
template <class Row, class Grad, class Use>
inline void layer_norm_backward(
    int64_t features, Moments of, const float* weight, const Row& row, const Grad& grad, float* grad_weight,
    float* grad_bias, float* scratch, const Use& use) {
  Floats sums{}, sums_n{};
  for_vectors(features, [&](int64_t first, auto count) {
    const Floats grad_y = grad(first, count), n = (row(first, count) - of.mean) * of.rstd;
    store(grad_weight + first, load(grad_weight + first, count) + grad_y * n, count);
    store(grad_bias + first, load(grad_bias + first, count) + grad_y, count);
    const Floats grad_n = grad_y * load(weight + first, count);
    store(scratch + first, grad_n, count);
    sums += grad_n;
    sums_n += grad_n * n;
  });
  // through mean and variance, the gradient loses its parts along 1 and along the normalised row
  const float along_ones = sum(sums) / features, along_n = sum(sums_n) / features;
  for_vectors(features, [&](int64_t first, auto count) {
    const Floats n = (row(first, count) - of.mean) * of.rstd;
    use(first, of.rstd * (load(scratch + first, count) - along_ones - n * along_n), count);
  });
}

}  // namespace mage_fast
