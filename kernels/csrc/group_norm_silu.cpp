// group_norm_silu: y = (x - mean) rstd weight + bias with mean and rstd of each group of channels, then
// y sigmoid(y). Here of contiguous maps, [images, channels, pixels]: a group is one piece of memory, and one
// thread's. channels_last maps have their own file.
#include <cmath>

#include "group_norm_channels_last.h"

namespace mage_fast {
namespace {

// f(vector) added up over adjacent elements, those of each stretch by themselves.
template <class T, class F>
float sum_of(const T* x, int64_t size, const F& f) {
  constexpr int64_t kStretch = 4096;
  Floats total{};
  for (int64_t begin = 0; begin < size; begin += kStretch) {
    Floats stretch{};
    for_vectors(std::min(kStretch, size - begin), [&](int64_t first, auto count) {
      const Floats value = f(load(x + begin + first, count));
      stretch += select(lane_numbers() < static_cast<int32_t>(count), value, Floats{});
    });
    total += stretch;
  }
  return sum(total);
}

// f(index of the group's statistics, its first element, its first channel) for every group of every image.
template <class F>
void for_groups(const MapShape& shape, const F& f) {
  parallel(shape.images * shape.groups, 1, [&](int64_t index) {
    f(index, index * shape.width() * shape.pixels, index % shape.groups * shape.width());
  });
}

template <class T>
void forward_contiguous(
    const T* x, const float* weight, const float* bias, const MapShape& shape, float eps, T* out, float* mean,
    float* rstd) {
  for_groups(shape, [&](int64_t index, int64_t element, int64_t channel) {
    const int64_t size = shape.width() * shape.pixels;
    const Floats shift = all(load(x + element, 1)[0]);
    const float from_shift =
        sum_of(x + element, size, [&](Floats v) { return v - shift; }) / static_cast<float>(size);
    const float square = sum_of(x + element, size, [&](Floats v) {
      const Floats delta = (v - shift) - from_shift;
      return delta * delta;
    });
    mean[index] = shift[0] + from_shift;
    rstd[index] = 1.0f / std::sqrt(square / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < shape.width(); ++i) {
      const Norm norm = norm_of(mean[index], rstd[index], weight[channel + i], bias[channel + i]);
      const int64_t first = element + i * shape.pixels;
      apply(x + first, shape.pixels, [&](int64_t, auto) { return norm; }, out + first);
    }
  });
}

template <class T>
void backward_contiguous(
    const T* grad, const T* x, const float* weight, const float* bias, const float* mean, const float* rstd,
    const MapShape& shape, T* grad_x, float* sum_weight, float* sum_bias) {
  for_groups(shape, [&](int64_t index, int64_t element, int64_t channel) {
    float *to_bias = sum_bias + index * shape.width(), *to_weight = sum_weight + index * shape.width();
    for (int64_t i = 0; i < shape.width(); ++i) {
      const Norm norm = norm_of(mean[index], rstd[index], weight[channel + i], bias[channel + i]);
      const int64_t first = element + i * shape.pixels;
      Floats bias_total{}, weight_total{};
      backward_sums(
          grad + first, x + first, shape.pixels, [&](int64_t, auto) { return norm; }, grad_x + first,
          [&](int64_t, auto count, Floats grad_y, Floats product) {
            const Ints inside = lane_numbers() < static_cast<int32_t>(count);
            bias_total += select(inside, grad_y, Floats{});
            weight_total += select(inside, product, Floats{});
          });
      to_bias[i] = sum(bias_total);
      to_weight[i] = sum(weight_total) * rstd[index];
    }
    const auto [offset, slope] = group_backward(to_bias, to_weight, weight + channel, rstd[index], shape);
    for (int64_t i = 0; i < shape.width(); ++i) {
      const NormBackward backward{
          norm_of(mean[index], rstd[index], weight[channel + i], bias[channel + i]), all(offset), all(slope)};
      const int64_t first = element + i * shape.pixels;
      backward_apply(
          grad + first, x + first, shape.pixels, [&](int64_t, auto) { return backward; }, grad_x + first);
    }
  });
}

MapShape shape_of(const Tensor& x, int64_t groups) {
  return {x.size(0), x.size(1), x.size(2) * x.size(3), groups};
}

// The memory of maps [N, C, H, W], which lie as the op was told. Strides of single elements say nothing.
template <class T>
T* maps(const Tensor& x, bool channels_last) {
  if (!channels_last) return data<T>(x);
  int64_t wanted = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(x.size(dim) <= 1 || x.stride(dim) == wanted, "mage_fast_cpu: maps are not channels_last");
    wanted *= x.size(dim);
  }
  STD_TORCH_CHECK(x.scalar_type() == scalar_type<T>(), "mage_fast_cpu: maps have another dtype");
  return static_cast<T*>(x.data_ptr());
}

void group_norm_silu(
    const Tensor& x, const Tensor& weight, const Tensor& bias, bool channels_last, int64_t groups, double eps,
    const Tensor& out, const Tensor& mean, const Tensor& rstd) {
  const MapShape shape = shape_of(x, groups);
  for_dtype(x, [&]<class T>(T) {
    (channels_last ? forward_channels_last<T> : forward_contiguous<T>)(
        maps<T>(x, channels_last), data<float>(weight), data<float>(bias), shape, static_cast<float>(eps),
        maps<T>(out, channels_last), data<float>(mean), data<float>(rstd));
  });
}

void group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& rstd, bool channels_last, int64_t groups, const Tensor& grad_x, const Tensor& grad_weight,
    const Tensor& grad_bias) {
  const MapShape shape = shape_of(x, groups);
  const int64_t sums = shape.images * shape.channels;  // the parameters' gradients of every image
  std::vector<float> sum_weight(sums), sum_bias(sums);
  for_dtype(x, [&]<class T>(T) {
    (channels_last ? backward_channels_last<T> : backward_contiguous<T>)(
        maps<T>(grad, channels_last), maps<T>(x, channels_last), data<float>(weight), data<float>(bias),
        data<float>(mean), data<float>(rstd), shape, maps<T>(grad_x, channels_last), sum_weight.data(),
        sum_bias.data());
  });
  sum_chunks(sum_weight, shape.channels, data<float>(grad_weight));
  sum_chunks(sum_bias, shape.channels, data<float>(grad_bias));
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, bool channels_last, int groups, float eps, "
      "Tensor(a!) out, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
      "bool channels_last, int groups, Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&mage_fast::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&mage_fast::group_norm_silu_backward));
}
