// add_norm: out = residual + dropout(branch), normed = LayerNorm(out). A thread takes a row at a time; the
// sums of the backward, over rows, are those of chunks of rows, added up in order.
#include "layer_norm.h"
#include "tensors.h"

namespace mage_fast {
namespace {

template <class Branch, class Residual>
void forward(
    const Branch* branch, const Residual* residual, const float* weight, const float* bias, float eps,
    int64_t rows, int64_t features, const Dropout& dropout, Residual* out, Branch* normed, float* mean,
    float* rstd) {
  torch::stable::parallel_for(0, rows, rows_of_task(features), [&](int64_t begin, int64_t end) {
    std::vector<int16_t> buffer;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t element = row * features;
      const int16_t* drawn = dropout.bits(element, features, buffer);
      Residual* const s = out + element;
      const Floats total = sum_vectors(features, [&](int64_t first, auto count) {
        const Floats y =
            dropout.apply(load(branch + element + first, count), drawn, first);
        store(s + first, load(residual + element + first, count) + y, count);
        return load(s + first, count);  // rounded: the statistics are those of the rows that backward reads
      });
      const Moments of = moments(s, features, total, eps);
      mean[row] = of.mean;
      rstd[row] = of.rstd;
      for_vectors(features, [&](int64_t first, auto count) {
        const Floats n = (load(s + first, count) - of.mean) * of.rstd;
        store(normed + element + first, n * load(weight + first, count) + load(bias + first, count), count);
      });
    }
  });
}

template <class Branch, class Residual>
void backward(
    const Residual* grad_out, const Branch* grad_normed, const Residual* out, const float* mean,
    const float* rstd, const float* weight, int64_t rows, int64_t features, const Dropout& dropout,
    Branch* grad_branch, Residual* grad_residual, float* grad_weight, float* grad_bias) {
  const RowChunks chunks(rows);
  std::vector<float> weights(chunks.count * features), biases(chunks.count * features);
  parallel(chunks.count, 1, [&](int64_t chunk) {
    std::vector<int16_t> buffer;
    std::vector<float> scratch(features);
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      const int64_t element = row * features;
      const int16_t* drawn = dropout.bits(element, features, buffer);
      layer_norm_backward(
          features, {mean[row], rstd[row]}, weight,
          [&](int64_t first, auto count) { return load(out + element + first, count); },
          [&](int64_t first, auto count) { return load(grad_normed + element + first, count); },
          weights.data() + chunk * features, biases.data() + chunk * features, scratch.data(),
          [&](int64_t first, Floats through_norm, auto count) {
            const Floats grad_s = load(grad_out + element + first, count) + through_norm;
            store(grad_residual + element + first, grad_s, count);
            store(
                grad_branch + element + first, dropout.apply(grad_s, drawn, first), count);
          });
    }
  });
  sum_chunks(weights, features, grad_weight);
  sum_chunks(biases, features, grad_bias);
}

void add_norm(
    const Tensor& branch, const Tensor& residual, const Tensor& weight, const Tensor& bias, double eps,
    std::optional<Tensor> state, int64_t stream, int64_t least_kept, double scale, const Tensor& out,
    const Tensor& normed, const Tensor& mean, const Tensor& rstd) {
  const Dropout dropout = dropout_of(state, stream, least_kept, scale);
  for_dtype(branch, [&]<class Branch>(Branch) {
    for_dtype(residual, [&]<class Residual>(Residual) {
      forward(
          data<Branch>(branch), data<Residual>(residual), data<float>(weight), data<float>(bias),
          static_cast<float>(eps), branch.size(0), branch.size(1), dropout, data<Residual>(out),
          data<Branch>(normed), data<float>(mean), data<float>(rstd));
    });
  });
}

void add_norm_backward(
    const Tensor& grad_out, const Tensor& grad_normed, const Tensor& out, const Tensor& mean,
    const Tensor& rstd, const Tensor& weight, std::optional<Tensor> state, int64_t stream, int64_t least_kept,
    double scale, const Tensor& grad_branch, const Tensor& grad_residual, const Tensor& grad_weight,
    const Tensor& grad_bias) {
  const Dropout dropout = dropout_of(state, stream, least_kept, scale);
  for_dtype(grad_normed, [&]<class Branch>(Branch) {
    for_dtype(out, [&]<class Residual>(Residual) {
      backward(
          data<Residual>(grad_out), data<Branch>(grad_normed), data<Residual>(out), data<float>(mean),
          data<float>(rstd), data<float>(weight), out.size(0), out.size(1), dropout,
          data<Branch>(grad_branch), data<Residual>(grad_residual), data<float>(grad_weight),
          data<float>(grad_bias));
    });
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "add_norm(Tensor branch, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor? state, "
      "int stream, int least_kept, float scale, Tensor(a!) out, Tensor(b!) normed, Tensor(c!) mean, "
      "Tensor(d!) rstd) -> ()");
  m.def(
      "add_norm_backward(Tensor grad_out, Tensor grad_normed, Tensor out, Tensor mean, Tensor rstd, "
      "Tensor weight, Tensor? state, int stream, int least_kept, float scale, Tensor(a!) grad_branch, "
      "Tensor(b!) grad_residual, Tensor(c!) grad_weight, Tensor(d!) grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("add_norm", TORCH_BOX(&mage_fast::add_norm));
  m.impl("add_norm_backward", TORCH_BOX(&mage_fast::add_norm_backward));
}
