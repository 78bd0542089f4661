// embed_kept: x = dropout(LayerNorm(word[id] + position[p])) of the kept positions. Forward, a thread takes a
// packed row at a time. Backward, so do the gradients of the embedded rows, written once; then each row of a
// table sums its own.
#include <memory>

#include "layer_norm.h"
#include "rows_by_key.h"
#include "tensors.h"

namespace mage_fast {
namespace {

// Id of every packed row: the class's at position 0, [M]'s where the token is masked, else the token's.
void find_ids(
    const Integers& ids, const Integers& class_ids, const Integers& positions, const bool* is_masked,
    int64_t samples, int64_t length, int64_t vocabulary, int64_t mask_token_id, int64_t rows,
    int32_t* ids_of_rows) {
  bool is_inside = true;
  for (int64_t row = 0; row < rows && is_inside; ++row) {
    const int64_t sample = positions[row] / (length + 1), position = positions[row] % (length + 1);
    is_inside = positions[row] >= 0 && sample < samples;
    if (!is_inside) break;
    const int64_t token = sample * length + position - 1;
    const int64_t id = position == 0      ? class_ids[sample]
                       : is_masked[token] ? mask_token_id
                                          : ids[token];
    is_inside = id >= 0 && id < vocabulary;
    ids_of_rows[row] = static_cast<int32_t>(id);
  }
  STD_TORCH_CHECK(is_inside, "embed_kept: a position outside the samples, or an id outside the vocabulary");
}

template <class T>
void forward(
    const int32_t* ids, const Integers& positions, const T* word_weight, const T* position_weight,
    const float* weight, const float* bias, float eps, int64_t rows, int64_t sequence, int64_t features,
    const Dropout& dropout, T* x, float* mean, float* rstd) {
  torch::stable::parallel_for(0, rows, rows_of_task(features), [&](int64_t begin, int64_t end) {
    std::vector<int16_t> buffer;
    std::vector<float> embedded(features);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t element = row * features;
      const int16_t* drawn = dropout.bits(element, features, buffer);
      const T* const word = word_weight + ids[row] * features;
      const T* const position = position_weight + positions[row] % sequence * features;
      const Floats total = sum_vectors(features, [&](int64_t first, auto count) {
        const Floats e = load(word + first, count) + load(position + first, count);
        store(embedded.data() + first, e, count);
        return e;
      });
      const Moments of = moments(embedded.data(), features, total, eps);
      mean[row] = of.mean;
      rstd[row] = of.rstd;
      for_vectors(features, [&](int64_t first, auto count) {
        const Floats n = (load(embedded.data() + first, count) - of.mean) * of.rstd;
        const Floats y = n * load(weight + first, count) + load(bias + first, count);
        store(x + element + first, dropout.apply(y, drawn, first), count);
      });
    }
  });
}

template <class T>
void backward(
    const T* grad, const std::vector<int64_t>& ids, const std::vector<int64_t>& positions, const float* mean,
    const float* rstd, const T* word_weight, const T* position_weight, const float* weight, int64_t features,
    const Dropout& dropout, float* grad_embedded, float* grad_weight, float* grad_bias) {
  const RowChunks chunks(ids.size());
  std::vector<float> weights(chunks.count * features), biases(chunks.count * features);
  parallel(chunks.count, 1, [&](int64_t chunk) {
    std::vector<int16_t> buffer;
    std::vector<float> scratch(features);
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      const int64_t element = row * features;
      const int16_t* drawn = dropout.bits(element, features, buffer);
      const T* const word = word_weight + ids[row] * features;
      const T* const position = position_weight + positions[row] * features;
      layer_norm_backward(
          features, {mean[row], rstd[row]}, weight,
          [&](int64_t first, auto count) {
            return load(word + first, count) + load(position + first, count);
          },
          [&](int64_t first, auto count) {
            return dropout.apply(load(grad + element + first, count), drawn, first);
          },
          weights.data() + chunk * features, biases.data() + chunk * features, scratch.data(),
          [&](int64_t first, Floats grad_e, auto count) {
            store(grad_embedded + element + first, grad_e, count);
          });
    }
  });
  sum_chunks(weights, features, grad_weight);
  sum_chunks(biases, features, grad_bias);
}

void embed_kept(
    const Tensor& ids, const Tensor& class_ids, const Tensor& positions, const Tensor& is_masked,
    const Tensor& word_weight, const Tensor& position_weight, const Tensor& weight, const Tensor& bias,
    int64_t mask_token_id, double eps, std::optional<Tensor> state, int64_t stream, int64_t least_kept,
    double scale, const Tensor& x, const Tensor& ids_of_rows, const Tensor& mean, const Tensor& rstd) {
  const Dropout dropout = dropout_of(state, stream, least_kept, scale);
  const Integers places(positions);
  find_ids(
      Integers(ids), Integers(class_ids), places, data<bool>(is_masked), ids.size(0), ids.size(1),
      word_weight.size(0), mask_token_id, positions.size(0), data<int32_t>(ids_of_rows));
  for_dtype(word_weight, [&]<class T>(T) {
    forward(
        data<int32_t>(ids_of_rows), places, data<T>(word_weight), data<T>(position_weight),
        data<float>(weight), data<float>(bias), static_cast<float>(eps), positions.size(0),
        position_weight.size(0), word_weight.size(1), dropout, data<T>(x), data<float>(mean),
        data<float>(rstd));
  });
}

void embed_kept_backward(
    const Tensor& grad, const Tensor& ids, const Tensor& positions, const Tensor& mean, const Tensor& rstd,
    const Tensor& word_weight, const Tensor& position_weight, const Tensor& weight,
    std::optional<Tensor> state, int64_t stream, int64_t least_kept, double scale, const Tensor& grad_word,
    const Tensor& grad_position, const Tensor& grad_weight, const Tensor& grad_bias) {
  const Dropout dropout = dropout_of(state, stream, least_kept, scale);
  const int64_t rows = grad.size(0), features = grad.size(1);
  const int64_t vocabulary = word_weight.size(0), sequence = position_weight.size(0);
  const Integers ids_in(ids), places(positions);
  std::vector<int64_t> id_of_row(rows), position_of_row(rows);
  bool is_inside = true;
  for (int64_t row = 0; row < rows; ++row) {
    id_of_row[row] = ids_in[row];
    position_of_row[row] = places[row] % sequence;
    is_inside &= id_of_row[row] >= 0 && id_of_row[row] < vocabulary && position_of_row[row] >= 0;
  }
  STD_TORCH_CHECK(is_inside, "embed_kept_backward: a position below 0, or an id outside the vocabulary");
  const auto grad_embedded = std::make_unique_for_overwrite<float[]>(rows * features);
  for_dtype(word_weight, [&]<class T>(T) {
    backward(
        data<T>(grad), id_of_row, position_of_row, data<float>(mean), data<float>(rstd), data<T>(word_weight),
        data<T>(position_weight), data<float>(weight), features, dropout, grad_embedded.get(),
        data<float>(grad_weight), data<float>(grad_bias));
    const auto sum_into = [&](T* table) {
      return [=](int64_t key, int64_t first, Floats sum, auto count) {
        store(table + key * features + first, sum, count);
      };
    };
    const float* const rows_in = grad_embedded.get();
    sum_by_key(rows_in, features, RowsByKey(id_of_row, vocabulary), sum_into(data<T>(grad_word)));
    sum_by_key(rows_in, features, RowsByKey(position_of_row, sequence), sum_into(data<T>(grad_position)));
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "embed_kept(Tensor ids, Tensor class_ids, Tensor positions, Tensor is_masked, Tensor word_weight, "
      "Tensor position_weight, Tensor weight, Tensor bias, int mask_token_id, float eps, Tensor? state, "
      "int stream, int least_kept, float scale, Tensor(a!) x, Tensor(b!) ids_of_rows, Tensor(c!) mean, "
      "Tensor(d!) rstd) -> ()");
  m.def(
      "embed_kept_backward(Tensor grad, Tensor ids, Tensor positions, Tensor mean, Tensor rstd, "
      "Tensor word_weight, Tensor position_weight, Tensor weight, Tensor? state, int stream, int least_kept, "
      "float scale, Tensor(a!) grad_word, Tensor(b!) grad_position, Tensor(c!) grad_weight, "
      "Tensor(d!) grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("embed_kept", TORCH_BOX(&mage_fast::embed_kept));
  m.impl("embed_kept_backward", TORCH_BOX(&mage_fast::embed_kept_backward));
}
