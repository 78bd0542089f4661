// Between torch's tensors and the kernels' pointers: checks that name op and argument, one instance of a
// kernel for each dtype, parallel loops, sums whose order does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "philox.h"
#include "simd.h"

namespace mage_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, bool>) return ScalarType::Bool;
}

// The tensor's memory. The launchers in Python give contiguous tensors of the right dtype: this asserts it.
template <class T>
T* data(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == scalar_type<T>(), "mage_fast_cpu: an argument has another dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "mage_fast_cpu: an argument is not contiguous");
  return static_cast<T*>(x.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& x) {
  return x.has_value() ? data<T>(*x) : nullptr;
}

// f(T{}) with T float or BFloat16, the tensor's dtype.
template <class F>
void for_dtype(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "mage_fast_cpu: wanted float32 or bfloat16");
  f(BFloat16{});
}

// Contiguous int32 or int64 numbers, read as int64.
class Integers {
 public:
  explicit Integers(const Tensor& x) : is_narrow_(x.scalar_type() == ScalarType::Int) {
    if (is_narrow_) {
      narrow_ = data<int32_t>(x);
    } else {
      wide_ = data<int64_t>(x);
    }
  }
  int64_t operator[](int64_t i) const { return is_narrow_ ? narrow_[i] : wide_[i]; }

 private:
  bool is_narrow_;
  const int32_t* narrow_ = nullptr;
  const int64_t* wide_ = nullptr;
};

// The generator of an int64 state (seed, step).
inline Philox philox_of(const Tensor& state, int64_t stream) {
  STD_TORCH_CHECK(state.numel() == 2, "mage_fast_cpu: rng_state has ", state.numel(), " elements, wanted 2");
  const int64_t* seed_step = data<int64_t>(state);
  return {static_cast<uint64_t>(seed_step[0]), static_cast<uint32_t>(stream),
          static_cast<uint32_t>(seed_step[1])};
}

// No state: nothing is dropped.
inline Dropout dropout_of(
    const std::optional<Tensor>& state, int64_t stream, int64_t least_kept, double scale) {
  return state.has_value() ? Dropout(philox_of(*state, stream), least_kept, scale) : Dropout();
}

// f(i) for i < count, on all threads; `grain` iterations at least go to one thread.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// The same where an f takes long: a thread that comes free takes the next i, so that none waits for a slower one.
template <class F>
void parallel_in_turn(int64_t count, const F& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
  });
}

// Rows of `features` elements that are worth a thread of their own: fewer take less time than waking it.
inline int64_t rows_of_task(int64_t features) { return 1 + 16384 / std::max<int64_t>(features, 1); }

// Rows in chunks whose number depends on the rows alone: what each chunk has summed is added up in order, so
// sums over rows have the same bits whatever the number of threads.
struct RowChunks {
  explicit RowChunks(int64_t rows)
      : rows(rows), size(std::clamp<int64_t>(rows / 64, 8, 32)), count((rows + size - 1) / size) {}
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * size); }
  int64_t rows, size, count;
};

// sum[f] = partials[0][f] + partials[1][f] + ..., what each addition rounds off added too (Neumaier's sum)
inline void sum_chunks(const std::vector<float>& partials, int64_t features, float* sum) {
  const int64_t chunks = static_cast<int64_t>(partials.size()) / std::max<int64_t>(features, 1);
  for_vectors(features, [&](int64_t first, auto count) {
    Floats total{}, lost{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Floats term = load(partials.data() + chunk * features + first, count), next = total + term;
      const Ints is_smaller = abs(term) < abs(total);
      lost += (select(is_smaller, total, term) - next) + select(is_smaller, term, total);
      total = next;
    }
    store(sum + first, total + lost, count);
  });
}

// Uninitialised memory for `count` floats, aligned as vectors are.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : vectors_(std::make_unique_for_overwrite<Floats[]>((count + kLanes - 1) / kLanes)) {}
  float* data() const { return reinterpret_cast<float*>(vectors_.get()); }

 private:
  std::unique_ptr<Floats[]> vectors_;
};

}  // namespace mage_fast
