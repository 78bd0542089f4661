// One row of label-smoothed cross-entropy and its gradient, for the ops that have logits and for those that
// make them. With s the smoothing and C the number of classes:
//   lse = log sum_c exp(x_c)
//   loss = (1 - s) (lse - x_target) + s (lse - mean_c x_c)
//   d loss / d x_c = exp(x_c - lse) - s / C - (1 - s) [c = target]
#pragma once

#include "tensors.h"
#include "vector_math.h"

namespace mage_fast {

// What one pass over a row adds up.
struct RowSums {
  Floats largest = all(-std::numeric_limits<float>::infinity()), x{}, exp{};
};

template <class T>
RowSums row_sums(const T* x, int64_t classes, float shift) {
  RowSums sums;
  for_vectors(classes, [&](int64_t first, auto count) {
    const Floats filled = load(x + first, count, -std::numeric_limits<float>::infinity());
    sums.largest = max(filled, sums.largest);  // passes over NaN, which the exponentials have
    sums.x += load(x + first, count);
    sums.exp += exp(filled - shift);
  });
  return sums;
}

struct RowLoss {
  float log_sum_exp, loss;
};

// Reads the row once, seldom twice: instead of its largest logit, that of the first ones shifts the
// exponentials, if no logit turns out to be much larger. An infinite largest logit gives NaN.
template <class T>
RowLoss row_loss(const T* x, int64_t classes, int64_t target, float smoothing) {
  constexpr float kFar = 16.0f;  // so e^kFar is far from overflow and as exact as e^0
  const float lowest = -std::numeric_limits<float>::infinity();
  float shift = max(load(x, std::min<int64_t>(classes, kLanes), lowest));
  RowSums sums = row_sums(x, classes, shift);
  const float largest = max(sums.largest);
  if (!(largest - shift <= kFar)) sums = row_sums(x, classes, shift = largest);
  const float log_sum_exp = shift + log(all(sum(sums.exp)))[0];
  const float nll = log_sum_exp - load(x + target, 1)[0];
  if (smoothing == 0.0f) return {log_sum_exp, nll};  // a logit of -infinity would give 0 * infinity
  const float mean_x = sum(sums.x) / static_cast<float>(classes);
  return {log_sum_exp, (1.0f - smoothing) * nll + smoothing * (log_sum_exp - mean_x)};
}

// d loss / d x times `scale`; may overwrite x.
template <class T>
void row_gradient(
    const T* x, float log_sum_exp, int64_t classes, int64_t target, float smoothing, float scale, T* grad) {
  const float share = smoothing / static_cast<float>(classes);
  const Floats x_target = all(load(x + target, 1)[0]);
  for_vectors(classes, [&](int64_t first, auto count) {
    store(grad + first, (exp(load(x + first, count) - log_sum_exp) - share) * scale, count);
  });
  store(grad + target, (exp(x_target - log_sum_exp) - share - (1.0f - smoothing)) * scale, 1);
}

// How many rows have a target. Not every caller has looked at the values, and none may be a wrong address.
inline int64_t count_targets(const int64_t* targets, int64_t rows, int64_t classes) {
  int64_t count = 0, largest = -1;
  for (int64_t row = 0; row < rows; ++row) {
    count += targets[row] >= 0;
    largest = std::max(largest, targets[row]);
  }
  STD_TORCH_CHECK(largest < classes, "mage_fast_cpu: target ", largest, " of ", classes, " classes");
  return count;
}

// The mean over the rows that have a target, and their number, at least 1. The others' losses are 0.
inline void mean_loss(const float* losses, int64_t rows, int64_t with_target, float* loss, float* count) {
  double sum = 0.0;
  for (int64_t row = 0; row < rows; ++row) sum += losses[row];
  *count = static_cast<float>(std::max<int64_t>(with_target, 1));
  *loss = static_cast<float>(sum / *count);
}

}  // namespace mage_fast
