// What linear_cross_entropy does between its matrix products: each row of a chunk of logits gives its loss
// and becomes d loss / d logits where it lies, while it is in the cache. A row is one thread's.
#include "cross_entropy.h"

namespace mage_fast {
namespace {

// `losses` of the rows; those without a target have 0 and no gradient. `grad_bias`: the gradients' sum over
// the chunk's rows is added to it.
template <class T>
void rows_in_place(
    T* logits, const int64_t* targets, int64_t rows, int64_t classes, float smoothing, bool with_gradient,
    float* losses, float* grad_bias) {
  count_targets(targets, rows, classes);
  const RowChunks chunks(rows);
  std::vector<float> partials(grad_bias ? (chunks.count + 1) * classes : 0);
  parallel(chunks.count, 1, [&](int64_t chunk) {
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      T* x = logits + row * classes;
      const int64_t target = targets[row];
      if (target < 0) {
        losses[row] = 0.0f;
        if (with_gradient) std::memset(x, 0, classes * sizeof(T));
        continue;
      }
      const RowLoss result = row_loss(x, classes, target, smoothing);
      losses[row] = result.loss;
      if (!with_gradient) continue;
      row_gradient(x, result.log_sum_exp, classes, target, smoothing, 1.0f, x);
      if (!grad_bias) continue;
      float* sums = partials.data() + (chunk + 1) * classes;
      for_vectors(classes, [&](int64_t first, auto count) {
        store(sums + first, load(sums + first, count) + load(x + first, count), count);
      });
    }
  });
  if (grad_bias) {  // the first partial sum: the chunks before
    std::copy_n(grad_bias, classes, partials.begin());
    sum_chunks(partials, classes, grad_bias);
  }
}

void linear_cross_entropy_rows(
    const Tensor& logits, const Tensor& targets, double smoothing, bool with_gradient, const Tensor& losses,
    std::optional<Tensor> grad_bias) {
  for_dtype(logits, [&]<class T>(T) {
    rows_in_place(
        data<T>(logits), data<int64_t>(targets), logits.size(0), logits.size(1),
        static_cast<float>(smoothing), with_gradient, data<float>(losses), data<float>(grad_bias));
  });
}

void linear_cross_entropy_mean(
    const Tensor& losses, const Tensor& targets, const Tensor& loss, const Tensor& count) {
  const int64_t rows = losses.size(0), *target = data<int64_t>(targets);
  const int64_t with_target = std::count_if(target, target + rows, [](int64_t t) { return t >= 0; });
  mean_loss(data<float>(losses), rows, with_target, data<float>(loss), data<float>(count));
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "linear_cross_entropy_rows(Tensor(a!) logits, Tensor targets, float smoothing, bool with_gradient, "
      "Tensor(b!) losses, Tensor(c!)? grad_bias) -> ()");
  m.def(
      "linear_cross_entropy_mean(Tensor losses, Tensor targets, Tensor(a!) loss, Tensor(b!) count) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("linear_cross_entropy_rows", TORCH_BOX(&mage_fast::linear_cross_entropy_rows));
  m.impl("linear_cross_entropy_mean", TORCH_BOX(&mage_fast::linear_cross_entropy_mean));
}
