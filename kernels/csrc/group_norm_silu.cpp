// group_norm_silu: y = (x - mean) rstd weight + bias with mean and rstd of each group of channels, then
// y sigmoid(y). Two passes over the maps, forward and backward: sums, then what is made of them.
//
// channels_last maps are [images, pixels, channels]. A group is a few channels of every pixel, so vectors run
// over the channels and the pixels are split into chunks, whose number depends on the pixels alone. The
// second pass walks over each thread's chunks backwards: the last ones read are still in the cache.
// Contiguous maps are [images, channels, pixels]. A group is one piece of memory and belongs to one thread.
#include <cmath>
#include <memory>

#include "tensors.h"
#include "vector_math.h"

namespace mage_fast {
namespace {

struct Shape {
  int64_t images, channels, pixels, groups;
  int64_t width() const { return channels / groups; }  // channels of a group
};

// An image's pixels in chunks.
struct PixelChunks {
  explicit PixelChunks(int64_t pixels)
      : pixels(pixels), size(std::clamp<int64_t>(pixels / 64, 16, 256)), count((pixels + size - 1) / size) {}
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t length(int64_t chunk) const { return std::min(pixels - begin(chunk), size); }
  int64_t pixels, size, count;
};

// f(image, chunk) for all chunks of all images, on all threads, each from its last to its first.
template <class F>
void backwards(int64_t images, const PixelChunks& chunks, const F& f) {
  torch::stable::parallel_for(0, images * chunks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) f(i / chunks.count, i % chunks.count);
  });
}

std::unique_ptr<float[]> floats_of(int64_t count) { return std::make_unique_for_overwrite<float[]>(count); }

// How elements are normalised, in every lane: y = (x - mean) scale + bias, scale being rstd weight. The mean
// is taken off first: near a great mean the difference is exact.
struct Norm {
  Floats mean, scale, bias;
};

// grad_x = grad_y scale - offset - (x - mean) slope
struct NormBackward {
  Norm norm;
  Floats offset, slope;
};

Norm norm_of(float mean, float rstd, float weight, float bias) {
  return {all(mean), all(rstd * weight), all(bias)};
}

inline Floats grad_before_silu(Floats grad, Floats centred, const Norm& norm) {
  const Floats y = centred * norm.scale + norm.bias, s = sigmoid(y);
  return grad * (s + (y * s) * (1.0f - s));
}

// The second pass of the forward, of elements that are adjacent in memory. norm_at(first, count) is theirs.
template <class T, class NormAt>
inline void apply(const T* x, int64_t size, const NormAt& norm_at, T* out) {
  for_vectors(size, [&](int64_t first, auto count) {
    const Norm norm = norm_at(first, count);
    const Floats y = (load(x + first, count) - norm.mean) * norm.scale + norm.bias;
    store(out + first, y * sigmoid(y), count);
  });
}

// Between the passes grad_y is kept where grad_x comes; bfloat16 has no room for it, there it is made again.
template <class T>
constexpr bool kKeepsGrad = std::is_same_v<T, float>;

// The first pass of the backward: add(first, count, grad_y, grad_y (x - mean)).
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

// The second pass of the backward.
template <class T, class NormAt>
inline void backward_apply(const T* grad, const T* x, int64_t size, const NormAt& norm_at, T* grad_x) {
  for_vectors(size, [&](int64_t first, auto count) {
    const NormBackward backward = norm_at(first, count);
    const Floats centred = load(x + first, count) - backward.norm.mean;
    Floats grad_y;
    if constexpr (kKeepsGrad<T>) grad_y = load(grad_x + first, count);
    else grad_y = grad_before_silu(load(grad + first, count), centred, backward.norm);
    const Floats scaled = rounded(grad_y * backward.norm.scale);  // of one element exactly the offset
    store(grad_x + first, (scaled - backward.offset) - centred * backward.slope, count);
  });
}

// What grad_x needs of a group: mean(grad_y scale), and its like with x_hat times rstd.
struct GroupBackward {
  float offset, slope;
};

// `sum_bias` and `sum_weight`: of each of its channels the sums of grad_y and of grad_y x_hat over the pixels.
GroupBackward group_backward(
    const float* sum_bias, const float* sum_weight, const float* weight, float rstd, const Shape& shape) {
  float offset = 0.0f, slope = 0.0f;
  for (int64_t channel = 0; channel < shape.width(); ++channel) {
    const float scale = rstd * weight[channel];
    offset += sum_bias[channel] * scale;
    slope += sum_weight[channel] * scale;
  }
  const float count = static_cast<float>(shape.width() * shape.pixels);
  return {offset / count, slope / count * rstd};
}

// ---- channels_last

// Mean and sum of squared deviations of `count` channels each in kVectors vectors, over the pixels. They are
// summed about the first pixel: as it is one of the pixels itself, the sum of squares about it is at most
// pixels + 1 times that about the mean, so little cancels whatever the mean is.
template <int kVectors, class T, class Count>
inline void moments(const T* x, int64_t pixels, int64_t channels, Count count, float* mean, float* square) {
  Floats shift[kVectors], total[kVectors] = {}, squares[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) shift[v] = load(x + v * kLanes, count);
  for (int64_t pixel = 1; pixel < pixels; ++pixel) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats delta = load(x + pixel * channels + v * kLanes, count) - shift[v];
      total[v] += delta;
      squares[v] += delta * delta;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const Floats from_shift = total[v] / static_cast<float>(pixels);
    store(mean + v * kLanes, shift[v] + from_shift, count);
    store(square + v * kLanes, squares[v] - total[v] * from_shift, count);
  }
}

// Means and sums of squared deviations of all channels over a chunk's pixels.
template <class T>
void chunk_moments(const T* x, int64_t pixels, int64_t channels, float* mean, float* square) {
  constexpr int kVectors = 4;  // sums that do not wait for each other
  constexpr std::integral_constant<int64_t, kLanes> kWhole;
  int64_t done = 0;
  for (; done + kVectors * kLanes <= channels; done += kVectors * kLanes) {
    moments<kVectors>(x + done, pixels, channels, kWhole, mean + done, square + done);
  }
  for_vectors(channels - done, [&](int64_t first, auto count) {
    moments<1>(x + done + first, pixels, channels, count, mean + done + first, square + done + first);
  });
}

// The groups' statistics of one image. `partials`: means and squares, [chunks, 2, channels]; the channels' own
// take the place of the first chunk's. What is added up are distances from one of the means.
void merge_moments(
    float* partials, const PixelChunks& chunks, const Shape& shape, float eps, float* mean, float* rstd) {
  const int64_t channels = shape.channels, width = shape.width();
  const float pixels = static_cast<float>(shape.pixels);
  for_vectors(channels, [&](int64_t first, auto count) {
    const Floats shift = load(partials + first, count);
    Floats total{}, squares{};
    for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
      const Floats chunk_mean = load(partials + 2 * chunk * channels + first, count);
      total += (chunk_mean - shift) * static_cast<float>(chunks.length(chunk));
    }
    const Floats from_shift = total / pixels;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const float* partial = partials + 2 * chunk * channels + first;
      const Floats delta = (load(partial, count) - shift) - from_shift;
      squares += load(partial + channels, count) + delta * delta * static_cast<float>(chunks.length(chunk));
    }
    store(partials + first, shift + from_shift, count);
    store(partials + channels + first, squares, count);
  });
  for (int64_t group = 0; group < shape.groups; ++group) {
    const float *means = partials + group * width, *squares = means + channels;
    float total = 0.0f, square = 0.0f;
    for (int64_t channel = 1; channel < width; ++channel) total += means[channel] - means[0];
    const float from_first = total / static_cast<float>(width);
    for (int64_t channel = 0; channel < width; ++channel) {
      const float delta = (means[channel] - means[0]) - from_first;
      square += squares[channel] + delta * delta * pixels;
    }
    mean[group] = means[0] + from_first;
    rstd[group] = 1.0f / std::sqrt(square / (static_cast<float>(width) * pixels) + eps);
  }
}

// The norms of all channels of all images: means and scales, [images, 2, channels]; the biases are the same.
std::unique_ptr<float[]> channel_norms(
    const float* mean, const float* rstd, const float* weight, const Shape& shape) {
  auto norms = floats_of(shape.images * 2 * shape.channels);
  for (int64_t image = 0; image < shape.images; ++image) {
    float* norm = norms.get() + image * 2 * shape.channels;
    for (int64_t group = 0; group < shape.groups; ++group) {
      const int64_t begin = group * shape.width(), index = image * shape.groups + group;
      for (int64_t channel = begin; channel < begin + shape.width(); ++channel) {
        norm[channel] = mean[index];
        norm[shape.channels + channel] = rstd[index] * weight[channel];
      }
    }
  }
  return norms;
}

// load(first, count) of the norms of an image's channels
auto norm_loader(const float* norms, const float* bias, int64_t image, int64_t channels) {
  const float *mean = norms + image * 2 * channels, *scale = mean + channels;
  return [=](int64_t first, auto count) {
    return Norm{load(mean + first, count), load(scale + first, count), load(bias + first, count)};
  };
}

template <class T>
void forward_channels_last(
    const T* x, const float* weight, const float* bias, const Shape& shape, float eps, T* out, float* mean,
    float* rstd) {
  const PixelChunks chunks(shape.pixels);
  const int64_t channels = shape.channels, groups = shape.groups;
  const auto partials = floats_of(shape.images * chunks.count * 2 * channels);
  parallel(shape.images * chunks.count, 1, [&](int64_t i) {
    const int64_t image = i / chunks.count, chunk = i % chunks.count;
    const T* from = x + (image * shape.pixels + chunks.begin(chunk)) * channels;
    float* partial = partials.get() + i * 2 * channels;
    chunk_moments(from, chunks.length(chunk), channels, partial, partial + channels);
  });
  parallel(shape.images, 1, [&](int64_t image) {
    float* of_image = partials.get() + image * chunks.count * 2 * channels;
    merge_moments(of_image, chunks, shape, eps, mean + image * groups, rstd + image * groups);
  });
  const auto norms = channel_norms(mean, rstd, weight, shape);
  backwards(shape.images, chunks, [&](int64_t image, int64_t chunk) {
    const auto norm_at = norm_loader(norms.get(), bias, image, channels);
    const int64_t begin = image * shape.pixels + chunks.begin(chunk);
    for (int64_t pixel = begin; pixel < begin + chunks.length(chunk); ++pixel) {
      apply(x + pixel * channels, channels, norm_at, out + pixel * channels);
    }
  });
}

template <class T>
void backward_channels_last(
    const T* grad, const T* x, const float* weight, const float* bias, const float* mean, const float* rstd,
    const Shape& shape, T* grad_x, float* sum_weight, float* sum_bias) {
  const PixelChunks chunks(shape.pixels);
  const int64_t channels = shape.channels, groups = shape.groups;
  const auto norms = channel_norms(mean, rstd, weight, shape);
  std::vector<float> partials(shape.images * chunks.count * 2 * channels);  // zeros
  parallel(shape.images * chunks.count, 1, [&](int64_t i) {
    const int64_t image = i / chunks.count, chunk = i % chunks.count;
    const auto norm_at = norm_loader(norms.get(), bias, image, channels);
    float *to_bias = partials.data() + i * 2 * channels, *to_weight = to_bias + channels;
    const int64_t begin = image * shape.pixels + chunks.begin(chunk);
    for (int64_t pixel = begin; pixel < begin + chunks.length(chunk); ++pixel) {
      const int64_t at = pixel * channels;
      backward_sums(
          grad + at, x + at, channels, norm_at, grad_x + at,
          [&](int64_t first, auto count, Floats grad_y, Floats product) {
            store(to_bias + first, load(to_bias + first, count) + grad_y, count);
            store(to_weight + first, load(to_weight + first, count) + product, count);
          });
    }
  });
  const auto offsets = floats_of(shape.images * 2 * channels);
  parallel(shape.images, 1, [&](int64_t image) {
    float *to_bias = sum_bias + image * channels, *to_weight = sum_weight + image * channels;
    const float* partial = partials.data() + image * chunks.count * 2 * channels;
    for_vectors(channels, [&](int64_t first, auto count) {
      Floats bias_total{}, weight_total{};
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        bias_total += load(partial + 2 * chunk * channels + first, count);
        weight_total += load(partial + (2 * chunk + 1) * channels + first, count);
      }
      store(to_bias + first, bias_total, count);
      store(to_weight + first, weight_total, count);
    });
    float* offset = offsets.get() + image * 2 * channels;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * shape.width();
      const float group_rstd = rstd[image * groups + group];
      for (int64_t channel = begin; channel < begin + shape.width(); ++channel) {
        to_weight[channel] *= group_rstd;  // grad_y (x - mean) to grad_y x_hat
      }
      const GroupBackward backward =
          group_backward(to_bias + begin, to_weight + begin, weight + begin, group_rstd, shape);
      std::fill_n(offset + begin, shape.width(), backward.offset);
      std::fill_n(offset + channels + begin, shape.width(), backward.slope);
    }
  });
  backwards(shape.images, chunks, [&](int64_t image, int64_t chunk) {
    const auto norm_at = norm_loader(norms.get(), bias, image, channels);
    const float *offset = offsets.get() + image * 2 * channels, *slope = offset + channels;
    const auto backward_at = [&](int64_t first, auto count) {
      return NormBackward{norm_at(first, count), load(offset + first, count), load(slope + first, count)};
    };
    const int64_t begin = image * shape.pixels + chunks.begin(chunk);
    for (int64_t pixel = begin; pixel < begin + chunks.length(chunk); ++pixel) {
      const int64_t at = pixel * channels;
      backward_apply(grad + at, x + at, channels, backward_at, grad_x + at);
    }
  });
}

// ---- contiguous

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
void for_groups(const Shape& shape, const F& f) {
  parallel(shape.images * shape.groups, 1, [&](int64_t index) {
    f(index, index * shape.width() * shape.pixels, index % shape.groups * shape.width());
  });
}

template <class T>
void forward_contiguous(
    const T* x, const float* weight, const float* bias, const Shape& shape, float eps, T* out, float* mean,
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
    const Shape& shape, T* grad_x, float* sum_weight, float* sum_bias) {
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

// ---- ops

Shape shape_of(const Tensor& x, int64_t groups) { return {x.size(0), x.size(1), x.size(2) * x.size(3), groups}; }

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
  const Shape shape = shape_of(x, groups);
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
  const Shape shape = shape_of(x, groups);
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
      "bool channels_last, int groups, Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&mage_fast::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&mage_fast::group_norm_silu_backward));
}
