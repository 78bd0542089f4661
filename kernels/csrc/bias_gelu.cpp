// bias_gelu: y = dropout(gelu(x + bias)). One pass over the rows, forward and backward.
#include "tensors.h"
#include "vector_math.h"

namespace mage_fast {
namespace {

template <class T>
void forward(const T* x, const float* bias, int64_t rows, int64_t features, const Dropout& dropout, T* out) {
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<int16_t> buffer;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t element = row * features;
      const int16_t* drawn = dropout.bits(element, features, buffer);
      for_vectors(features, [&](int64_t first, auto count) {
        const Floats s = load(x + element + first, count) + load(bias + first, count);
        store(out + element + first, dropout.apply(gelu(s), drawn, first), count);
      });
    }
  });
}

template <class T>
void backward(
    const T* grad, const T* x, const float* bias, int64_t rows, int64_t features, const Dropout& dropout,
    T* grad_x, float* grad_bias) {
  const RowChunks chunks(rows);
  std::vector<float> partials(chunks.count * features);
  parallel(chunks.count, 1, [&](int64_t chunk) {
    std::vector<int16_t> buffer;
    float* sums = partials.data() + chunk * features;
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      const int64_t element = row * features;
      const int16_t* drawn = dropout.bits(element, features, buffer);
      for_vectors(features, [&](int64_t first, auto count) {
        const Floats s = load(x + element + first, count) + load(bias + first, count);
        const Floats grad_y = load(grad + element + first, count);
        const Floats grad_s = dropout.apply(grad_y, drawn, first) * gelu_slope(s);
        store(grad_x + element + first, grad_s, count);
        store(sums + first, load(sums + first, count) + grad_s, count);
      });
    }
  });
  sum_chunks(partials, features, grad_bias);
}

void bias_gelu(
    const Tensor& x, const Tensor& bias, std::optional<Tensor> state, int64_t stream, int64_t least_kept,
    double scale, const Tensor& out) {
  const Dropout dropout = dropout_of(state, stream, least_kept, scale);
  for_dtype(x, [&]<class T>(T) {
    forward(data<T>(x), data<float>(bias), x.size(0), x.size(1), dropout, data<T>(out));
  });
}

void bias_gelu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& bias, std::optional<Tensor> state, int64_t stream,
    int64_t least_kept, double scale, const Tensor& grad_x, const Tensor& grad_bias) {
  const Dropout dropout = dropout_of(state, stream, least_kept, scale);
  for_dtype(x, [&]<class T>(T) {
    backward(
        data<T>(grad), data<T>(x), data<float>(bias), x.size(0), x.size(1), dropout, data<T>(grad_x),
        data<float>(grad_bias));
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "bias_gelu(Tensor x, Tensor bias, Tensor? state, int stream, int least_kept, float scale, "
      "Tensor(a!) out) -> ()");
  m.def(
      "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, Tensor? state, int stream, int least_kept, "
      "float scale, Tensor(a!) grad_x, Tensor(b!) grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&mage_fast::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&mage_fast::bias_gelu_backward));
}
