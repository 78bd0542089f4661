// group_norm_silu of channels_last maps, [images, pixels, channels]. A group is a few channels of each pixel,
// so vectors run over the channels, and the pixels are split into chunks, by their number alone. Two passes,
// forward and backward: sums over each chunk, which are merged in order; then their use. The second
// pass walks over each thread's chunks from the last to the first: those read last are still in the cache.
#pragma once

#include <cmath>

#include "group_norm_silu.h"

namespace mage_fast {

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

// The groups' statistics of one image. `partials`: means and squares, [chunks, 2, channels]; those of whole
// channels take the place of the first chunk's. What is added up are distances from one of the means.
inline void merge_moments(
    float* partials, const PixelChunks& chunks, const MapShape& shape, float eps, float* mean, float* rstd) {
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
inline Buffer channel_norms(
    const float* mean, const float* rstd, const float* weight, const MapShape& shape) {
  Buffer norms(shape.images * 2 * shape.channels);
  for (int64_t image = 0; image < shape.images; ++image) {
    float* norm = norms.data() + image * 2 * shape.channels;
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
inline auto norm_loader(const float* norms, const float* bias, int64_t image, int64_t channels) {
  const float *mean = norms + image * 2 * channels, *scale = mean + channels;
  return [=](int64_t first, auto count) {
    return Norm{load(mean + first, count), load(scale + first, count), load(bias + first, count)};
  };
}

template <class T>
void forward_channels_last(
    const T* x, const float* weight, const float* bias, const MapShape& shape, float eps, T* out, float* mean,
    float* rstd) {
  const PixelChunks chunks(shape.pixels);
  const int64_t channels = shape.channels, groups = shape.groups;
  const Buffer partials(shape.images * chunks.count * 2 * channels);
  parallel(shape.images * chunks.count, 1, [&](int64_t i) {
    const int64_t image = i / chunks.count, chunk = i % chunks.count;
    const T* from = x + (image * shape.pixels + chunks.begin(chunk)) * channels;
    float* partial = partials.data() + i * 2 * channels;
    chunk_moments(from, chunks.length(chunk), channels, partial, partial + channels);
  });
  parallel(shape.images, 1, [&](int64_t image) {
    float* of_image = partials.data() + image * chunks.count * 2 * channels;
    merge_moments(of_image, chunks, shape, eps, mean + image * groups, rstd + image * groups);
  });
  const Buffer norms = channel_norms(mean, rstd, weight, shape);
  backwards(shape.images, chunks, [&](int64_t image, int64_t chunk) {
    const auto norm_at = norm_loader(norms.data(), bias, image, channels);
    const int64_t begin = image * shape.pixels + chunks.begin(chunk);
    for (int64_t pixel = begin; pixel < begin + chunks.length(chunk); ++pixel) {
      apply(x + pixel * channels, channels, norm_at, out + pixel * channels);
    }
  });
}

template <class T>
void backward_channels_last(
    const T* grad, const T* x, const float* weight, const float* bias, const float* mean, const float* rstd,
    const MapShape& shape, T* grad_x, float* sum_weight, float* sum_bias) {
  const PixelChunks chunks(shape.pixels);
  const int64_t channels = shape.channels, groups = shape.groups;
  const Buffer norms = channel_norms(mean, rstd, weight, shape);
  const Buffer partials(shape.images * chunks.count * 2 * channels);
  parallel(shape.images * chunks.count, 1, [&](int64_t i) {
    const int64_t image = i / chunks.count, chunk = i % chunks.count;
    const auto norm_at = norm_loader(norms.data(), bias, image, channels);
    float *to_bias = partials.data() + i * 2 * channels, *to_weight = to_bias + channels;
    std::fill_n(to_bias, 2 * channels, 0.0f);
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
  const Buffer offsets(shape.images * 2 * channels);
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
    float* offset = offsets.data() + image * 2 * channels;
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
    const auto norm_at = norm_loader(norms.data(), bias, image, channels);
    const float *offset = offsets.data() + image * 2 * channels, *slope = offset + channels;
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

}  // namespace mage_fast
