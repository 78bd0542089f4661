// group_norm_silu of elements that are adjacent in memory, whatever the maps' format: what is done to each
// element in the passes of the forward and of the backward.
#pragma once

#include "tensors.h"
#include "vector_math.h"

namespace mage_fast {

struct MapShape {
  int64_t images, channels, pixels, groups;
  int64_t width() const { return channels / groups; }  // channels of a group
};

// How elements are normalised: y = (x - mean) scale + bias, scale being rstd weight. The mean is taken off
// first: near a great mean the difference is exact.
struct Norm {
  Floats mean, scale, bias;
};

// grad_x = grad_y scale - offset - (x - mean) slope
struct NormBackward {
  Norm norm;
  Floats offset, slope;
};

inline Norm norm_of(float mean, float rstd, float weight, float bias) {
  return {all(mean), all(rstd * weight), all(bias)};
}

// The forward's second pass. norm_at(first, count) has the norms of these elements.
template <class T, class NormAt>
inline void apply(const T* x, int64_t size, const NormAt& norm_at, T* out) {
  for_vectors(size, [&](int64_t first, auto count) {
    const Norm norm = norm_at(first, count);
    const Floats y = (load(x + first, count) - norm.mean) * norm.scale + norm.bias;
    store(out + first, y * sigmoid(y), count);
  });
}

// The gradient of y, by which y sigmoid(y) is differentiated.
inline Floats grad_before_silu(Floats grad, Floats centred, const Norm& norm) {
  const Floats y = centred * norm.scale + norm.bias, s = sigmoid(y);
  return grad * (s + (y * s) * (1.0f - s));
}

// Between the backward's passes grad_y stays where grad_x comes. bfloat16 would round it: it is made again.
template <class T>
constexpr bool kKeepsGrad = std::is_same_v<T, float>;

// The backward's first pass: add(first, count, grad_y, grad_y (x - mean)).
template <class T, class NormAt, class Add>
inline void backward_sums(
    const T* grad, const T* x, int64_t size, const NormAt& norm_at, T* grad_x, const Add& add) {
  for_vectors(size, [&](int64_t first, auto count) {
    const Norm norm = norm_at(first, count);
    const Floats centred = load(x + first, count) - norm.mean;
    const Floats grad_y = grad_before_silu(load(grad + first, count), centred, norm);
    if constexpr (kKeepsGrad<T>) store(grad_x + first, grad_y, count);
    add(first, count, grad_y, grad_y * centred);
  });
}

// The backward's second pass. backward_at(first, count) is NormBackward.
template <class T, class BackwardAt>
inline void backward_apply(
    const T* grad, const T* x, int64_t size, const BackwardAt& backward_at, T* grad_x) {
  for_vectors(size, [&](int64_t first, auto count) {
    const NormBackward backward = backward_at(first, count);
    const Floats centred = load(x + first, count) - backward.norm.mean;
    Floats grad_y;
    if constexpr (kKeepsGrad<T>) grad_y = load(grad_x + first, count);
    else grad_y = grad_before_silu(load(grad + first, count), centred, backward.norm);
    const Floats scaled = rounded(grad_y * backward.norm.scale);  // of one element exactly the offset
    store(grad_x + first, (scaled - backward.offset) - centred * backward.slope, count);
  });
}

struct GroupBackward {
  float offset, slope;
};

// What a group shares of NormBackward: mean(grad_y scale) and rstd mean(grad_y scale x_hat). `sum_bias` and
// `sum_weight` are, of each of its channels, the sums of grad_y and of grad_y x_hat over the pixels.
inline GroupBackward group_backward(
    const float* sum_bias, const float* sum_weight, const float* weight, float rstd, const MapShape& shape) {
  float offset = 0.0f, slope = 0.0f;
  for (int64_t channel = 0; channel < shape.width(); ++channel) {
    const float scale = rstd * weight[channel];
    offset += sum_bias[channel] * scale;
    slope += sum_weight[channel] * scale;
  }
  const float count = static_cast<float>(shape.width() * shape.pixels);
  return {offset / count, slope / count * rstd};
}

}  // namespace mage_fast
