// masked_cross_entropy: mean label-smoothed cross-entropy of the rows that have a target. A row is one
// thread's; those without a target are not read. The mean is a sum in the order of the rows.
#include "cross_entropy.h"

namespace mage_fast {
namespace {

template <class T>
void forward(
    const T* logits, const int64_t* targets, int64_t rows, int64_t classes, float smoothing, float* loss,
    float* log_sum_exp, float* count) {
  const int64_t with_target = count_targets(targets, rows, classes);
  std::vector<float> losses(rows);
  parallel(rows, rows_of_task(classes), [&](int64_t row) {
    log_sum_exp[row] = 0.0f;
    if (targets[row] < 0) return;
    const RowLoss result = row_loss(logits + row * classes, classes, targets[row], smoothing);
    log_sum_exp[row] = result.log_sum_exp;
    losses[row] = result.loss;
  });
  mean_loss(losses.data(), rows, with_target, loss, count);
}

template <class T>
void backward(
    const T* logits, const float* log_sum_exp, const int64_t* targets, int64_t rows, int64_t classes,
    float smoothing, float scale, T* grad_logits) {
  count_targets(targets, rows, classes);
  parallel(rows, rows_of_task(classes), [&](int64_t row) {
    const T* x = logits + row * classes;
    T* grad = grad_logits + row * classes;
    if (targets[row] < 0) {
      std::memset(grad, 0, classes * sizeof(T));
    } else {
      row_gradient(x, log_sum_exp[row], classes, targets[row], smoothing, scale, grad);
    }
  });
}

void masked_cross_entropy(
    const Tensor& logits, const Tensor& targets, double smoothing, const Tensor& loss,
    const Tensor& log_sum_exp, const Tensor& count) {
  for_dtype(logits, [&]<class T>(T) {
    forward(
        data<T>(logits), data<int64_t>(targets), logits.size(0), logits.size(1),
        static_cast<float>(smoothing), data<float>(loss), data<float>(log_sum_exp), data<float>(count));
  });
}

void masked_cross_entropy_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& log_sum_exp, const Tensor& count,
    const Tensor& targets, double smoothing, const Tensor& grad_logits) {
  const float scale = *data<float>(grad) / *data<float>(count);
  for_dtype(logits, [&]<class T>(T) {
    backward(
        data<T>(logits), data<float>(log_sum_exp), data<int64_t>(targets), logits.size(0), logits.size(1),
        static_cast<float>(smoothing), scale, data<T>(grad_logits));
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "masked_cross_entropy(Tensor logits, Tensor targets, float smoothing, Tensor(a!) loss, "
      "Tensor(b!) log_sum_exp, Tensor(c!) count) -> ()");
  m.def(
      "masked_cross_entropy_backward(Tensor grad, Tensor logits, Tensor log_sum_exp, Tensor count, "
      "Tensor targets, float smoothing, Tensor(a!) grad_logits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&mage_fast::masked_cross_entropy));
  m.impl("masked_cross_entropy_backward", TORCH_BOX(&mage_fast::masked_cross_entropy_backward));
}
