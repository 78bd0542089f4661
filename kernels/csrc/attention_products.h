// The matrix products of attention, with a block of keys and values that is laid out once for all queries:
// in float, or as pairs of bfloat16 where the tensors and the processor have them. Sums are in float.
#pragma once

#include <type_traits>

#include "matmul.h"
#include "matmul_bfloat16.h"
#include "tensors.h"

namespace mage_fast {

// Rows of a tensor, `stride` elements apart.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, count;
};

class FloatProducts {
 public:
  // At most so many keys and, of queries, rows at a time; `backward`: also the products of the gradients.
  FloatProducts(int64_t features, int64_t keys, int64_t rows, bool backward)
      : features_(features), backward_(backward),
        scratch_(
            2 * Scratch::room(features, keys) + Scratch::room(keys, features) + 2 * Scratch::room(rows, features)),
        kt_(scratch_.take(features, keys)), vt_(backward ? scratch_.take(features, keys) : Matrix{}),
        k_or_v_(scratch_.take(keys, features)), first_(scratch_.take(rows, features)),
        second_(backward ? scratch_.take(rows, features) : Matrix{}) {}

  // Forward: K^T and V. Backward: K^T, V^T and K.
  template <class T>
  void set_keys(Rows<T> k, Rows<T> v) {
    keys_ = k.count;
    copy_transposed(k.data, k.stride, keys_, features_, kt_);
    if (backward_) copy_transposed(v.data, v.stride, keys_, features_, vt_);
    const Rows<T> rows = backward_ ? k : v;
    copy_rows(rows.data, rows.stride, keys_, features_, k_or_v_);
  }

  // to = q K^T
  template <class T>
  void scores(Rows<T> q, Matrix to) {
    times(q, first_, kt_, to);
  }
  // to = grad V^T
  template <class T>
  void value_products(Rows<T> grad, Matrix to) {
    times(grad, second_, vt_, to);
  }
  // sums (+)= p V; backward: p K
  void sum_rows(Matrix p, int64_t rows, bool add, Matrix sums) {
    multiply<false>(p, k_or_v_, rows, whole_vectors(features_), keys_, add, sums);
  }
  // sums (+)= p^T grad
  template <class T>
  void sum_grads(Matrix p, Rows<T> grad, bool add, Matrix sums) {
    multiply<true>(p, second_, keys_, whole_vectors(features_), grad.count, add, sums);
  }
  // sums (+)= p^T q
  template <class T>
  void sum_queries(Matrix p, Rows<T> q, bool add, Matrix sums) {
    multiply<true>(p, first_, keys_, whole_vectors(features_), q.count, add, sums);
  }

 private:
  template <class T>
  void times(Rows<T> rows, Matrix copy, Matrix right, Matrix to) {
    copy_rows(rows.data, rows.stride, rows.count, features_, copy);
    multiply<false>(copy, right, rows.count, whole_vectors(keys_), features_, false, to);
  }

  int64_t features_, keys_ = 0;
  bool backward_;
  Scratch scratch_;
  Matrix kt_, vt_, k_or_v_, first_, second_;
};

#if defined(__AVX512F__)

class PairProducts {
 public:
  PairProducts(int64_t features, int64_t keys, int64_t rows, bool backward)
      : features_(features), backward_(backward), kt_(panels(keys) * panel_size(features)),
        vt_(backward ? panels(keys) * panel_size(features) : 0), k_or_v_(panels(features) * panel_size(keys)),
        right_(backward ? panels(features) * panel_size(rows) : 0),
        left_(std::max(rows * stride_of_pairs(keys), backward ? panel_size(rows) : 0)) {}

  void set_keys(Rows<BFloat16> k, Rows<BFloat16> v) {
    keys_ = k.count;
    for_panels(keys_, features_, kt_, [&](int64_t key, int64_t width, BFloat16* panel) {
      pack_columns(k.data + key * k.stride, k.stride, width, features_, panel);
    });
    if (backward_) {
      for_panels(keys_, features_, vt_, [&](int64_t key, int64_t width, BFloat16* panel) {
        pack_columns(v.data + key * v.stride, v.stride, width, features_, panel);
      });
    }
    pack(backward_ ? k : v, k_or_v_);
  }

  void scores(Rows<BFloat16> q, Matrix to) { times(q, kt_, to); }
  void value_products(Rows<BFloat16> grad, Matrix to) { times(grad, vt_, to); }

  void sum_rows(Matrix p, int64_t rows, bool add, Matrix sums) {
    const int64_t stride = stride_of_pairs(keys_);
    for (int64_t row = 0; row < rows; ++row) round_row(p.row(row), keys_, left_.data() + row * stride);
    for_panels(features_, keys_, k_or_v_, [&](int64_t first, int64_t width, const BFloat16* panel) {
      multiply_panel(
          {left_.data(), stride, 2}, panel, rows, whole_vectors(width), keys_, nullptr, add, sums.data + first,
          sums.stride);
    });
  }

  void sum_grads(Matrix p, Rows<BFloat16> grad, bool add, Matrix sums) { sum_transposed(p, grad, add, sums); }
  void sum_queries(Matrix p, Rows<BFloat16> q, bool add, Matrix sums) { sum_transposed(p, q, add, sums); }

 private:
  static int64_t panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
  // Of rows of at least so many elements, whole pairs.
  static int64_t stride_of_pairs(int64_t count) { return (count + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes; }

  // f(first column, columns, panel) for the panels of a right factor of `depth` rows.
  template <class F>
  static void for_panels(int64_t columns, int64_t depth, const PanelBuffer& buffer, const F& f) {
    for (int64_t first = 0; first < columns; first += kPanelColumns) {
      f(first, std::min(kPanelColumns, columns - first), buffer.data() + first / kPanelColumns * panel_size(depth));
    }
  }

  void pack(Rows<BFloat16> rows, const PanelBuffer& to) {
    for_panels(features_, rows.count, to, [&](int64_t first, int64_t width, BFloat16* panel) {
      pack_rows(rows.data + first, rows.stride, width, rows.count, panel);
    });
  }

  void times(Rows<BFloat16> rows, const PanelBuffer& right, Matrix to) {
    for_panels(keys_, features_, right, [&](int64_t key, int64_t width, const BFloat16* panel) {
      multiply_panel(
          {rows.data, rows.stride, 2}, panel, rows.count, whole_vectors(width), features_, nullptr, false,
          to.data + key, to.stride);
    });
  }

  void sum_transposed(Matrix p, Rows<BFloat16> rows, bool add, Matrix sums) {
    pack(rows, right_);
    for (int64_t key = 0; key < keys_; key += kPanelColumns) {
      const int64_t some = std::min(kPanelColumns, keys_ - key);
      // the left factor's pairs are along its columns
      pack_rows(p.data + key, p.stride, some, rows.count, left_.data());
      for_panels(features_, rows.count, right_, [&](int64_t first, int64_t width, const BFloat16* panel) {
        multiply_panel(
            {left_.data(), 2, 2 * kPanelColumns}, panel, some, whole_vectors(width), rows.count, nullptr, add,
            sums.row(key) + first, sums.stride);
      });
    }
  }

  int64_t features_, keys_ = 0;
  bool backward_;
  PanelBuffer kt_, vt_, k_or_v_, right_, left_;
};

#endif  // __AVX512F__

// f(T{}, type of the products) for the dtype of qkv.
template <class F>
void for_products(const Tensor& qkv, [[maybe_unused]] int64_t features, const F& f) {
#if defined(__AVX512F__)
  if (qkv.scalar_type() == ScalarType::BFloat16 && features % 2 == 0 && has_bfloat16_dot()) {
    return f(BFloat16{}, std::type_identity<PairProducts>{});
  }
#endif
  for_dtype(qkv, [&]<class T>(T) { f(T{}, std::type_identity<FloatProducts>{}); });
}

}  // namespace mage_fast
