// pad_decoder: out[b, s] = row + position[s], the row being encoded[source[b, s]], or where the source is
// negative the image's class row or the mask token. Forward, a thread takes an output row at a time;
// backward, it sums the gradients of the output rows that showed an encoded row, or had a position.
#include "rows_by_key.h"
#include "tensors.h"

namespace mage_fast {
namespace {

// The encoded row that feeds each position; row `rows` stands for the mask token.
std::vector<int64_t> find_rows(
    const Tensor& source, const Tensor& cu_seqlens, int64_t rows, bool with_mask_token) {
  const int64_t images = source.size(0), positions = source.size(1);
  const Integers source_of(source), first_row(cu_seqlens);
  std::vector<int64_t> found(images * positions);
  bool is_inside = true;
  for (int64_t image = 0; image < images; ++image) {
    const int64_t padding = with_mask_token ? rows : first_row[image];
    for (int64_t i = image * positions; i < (image + 1) * positions; ++i) {
      const int64_t row = source_of[i];
      found[i] = row < 0 ? padding : row;
      is_inside &= row < rows && found[i] >= 0 && found[i] < rows + with_mask_token;
    }
  }
  STD_TORCH_CHECK(is_inside, "pad_decoder: a row outside the encoded ones");
  return found;
}

template <class Encoded, class Position, class Out>
void forward(
    const Encoded* encoded, const std::vector<int64_t>& row_of, const Position* position_weight,
    const float* mask_token, int64_t rows, int64_t positions, int64_t features, Out* out) {
  const int64_t count = static_cast<int64_t>(row_of.size());
  parallel(count, rows_of_task(features), [&](int64_t i) {
    const Position* const position = position_weight + i % positions * features;
    const auto add = [&](const auto* row) {
      for_vectors(features, [&](int64_t first, auto count) {
        store(out + i * features + first, load(row + first, count) + load(position + first, count), count);
      });
    };
    if (row_of[i] == rows) {
      add(mask_token);
    } else {
      add(encoded + row_of[i] * features);
    }
  });
}

template <class Grad, class Encoded, class Position>
void backward(
    const Grad* grad, const std::vector<int64_t>& row_of, int64_t rows, bool with_mask_token,
    int64_t positions, int64_t features, Encoded* grad_encoded, Position* grad_position,
    float* grad_mask_token) {
  sum_by_key(
      grad, features, RowsByKey(row_of, rows + with_mask_token),
      [&](int64_t row, int64_t first, Floats sum, auto count) {
        if (row < rows) {
          store(grad_encoded + row * features + first, sum, count);
        } else {
          store(grad_mask_token + first, sum, count);
        }
      });
  std::vector<int64_t> position_of(row_of.size());
  for (size_t i = 0; i < row_of.size(); ++i) position_of[i] = i % positions;
  sum_by_key(
      grad, features, RowsByKey(position_of, positions),
      [&](int64_t position, int64_t first, Floats sum, auto count) {
        store(grad_position + position * features + first, sum, count);
      });
}

void pad_decoder(
    const Tensor& encoded, const Tensor& source, const Tensor& cu_seqlens, const Tensor& position_weight,
    std::optional<Tensor> mask_token, const Tensor& out) {
  const int64_t rows = encoded.size(0), features = encoded.size(1);
  const std::vector<int64_t> row_of = find_rows(source, cu_seqlens, rows, mask_token.has_value());
  for_dtype(encoded, [&]<class Encoded>(Encoded) {
    for_dtype(position_weight, [&]<class Position>(Position) {
      using Out = std::conditional_t<std::is_same_v<Encoded, Position>, Encoded, float>;
      forward(
          data<Encoded>(encoded), row_of, data<Position>(position_weight), data<float>(mask_token), rows,
          source.size(1), features, data<Out>(out));
    });
  });
}

// The rows' sums are of encoded's dtype, those of positions of position_weight's: the outputs say which.
void pad_decoder_backward(
    const Tensor& grad, const Tensor& source, const Tensor& cu_seqlens, const Tensor& grad_encoded,
    const Tensor& grad_position, std::optional<Tensor> grad_mask_token) {
  const int64_t rows = grad_encoded.size(0), features = grad.size(2);
  const bool with_mask_token = grad_mask_token.has_value();
  const std::vector<int64_t> row_of = find_rows(source, cu_seqlens, rows, with_mask_token);
  for_dtype(grad, [&]<class Grad>(Grad) {
    for_dtype(grad_encoded, [&]<class Encoded>(Encoded) {
      for_dtype(grad_position, [&]<class Position>(Position) {
        backward(
            data<Grad>(grad), row_of, rows, with_mask_token, grad.size(1), features,
            data<Encoded>(grad_encoded), data<Position>(grad_position), data<float>(grad_mask_token));
      });
    });
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "pad_decoder(Tensor encoded, Tensor source, Tensor cu_seqlens, Tensor position_weight, "
      "Tensor? mask_token, Tensor(a!) out) -> ()");
  m.def(
      "pad_decoder_backward(Tensor grad, Tensor source, Tensor cu_seqlens, Tensor(a!) grad_encoded, "
      "Tensor(b!) grad_position, Tensor(c!)? grad_mask_token) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("pad_decoder", TORCH_BOX(&mage_fast::pad_decoder));
  m.impl("pad_decoder_backward", TORCH_BOX(&mage_fast::pad_decoder_backward));
}
