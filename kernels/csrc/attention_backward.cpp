// attention, backward: of O = dropout(P) V, P = softmax(S), S = scale Q K^T,
//
//     dV = dropout(P)^T dO                    D = rowsum(dO * O)
//     dS = P * (dropout(dO V^T) - D)          dQ = scale dS K,  dK = scale dS^T Q
//
// with P rebuilt from the logarithms of the totals and dropout drawn again. A task is a head of a sequence,
// so no two write the same gradient. For all its keys (kMostKeys of them at a time, if there are more) it has
// K, K^T and V^T in the cache (attention_products.h); a block of queries at a time, dropout(P) and dS come to
// stand where S and dO V^T did, and the sums of dV, dK and dQ go on.
#include "attention.h"

#include <limits>

#include "attention_products.h"
#include "vector_math.h"

namespace mage_fast {
namespace {

constexpr int64_t kBlockQueries = 90;

template <class Products>
class Backward {
 public:
  Backward(Heads heads, float scale, const ProbabilityDropout& dropout, int64_t longest)
      : heads_(heads), scale_(scale), dropout_(dropout), queries_(longest),
        keys_(std::min(longest, kMostKeys)),
        products_(heads.features, keys_, kBlockQueries, true),
        scratch_(
            Scratch::room(queries_, heads.features) + 2 * Scratch::room(keys_, heads.features) +
            2 * Scratch::room(kBlockQueries, keys_) + Scratch::room(queries_)),
        grad_q_(scratch_.take(queries_, heads.features)), grad_k_(scratch_.take(keys_, heads.features)),
        grad_v_(scratch_.take(keys_, heads.features)), p_(scratch_.take(kBlockQueries, keys_)),
        grad_p_(scratch_.take(kBlockQueries, keys_)),
        deltas_(scratch_.take(queries_)), drawn_(dropout.drops ? dropout.room(kBlockQueries, keys_) : 0) {}

  template <class T>
  void run(
      const Task& task, const Task& next, const T* grad, const T* qkv, const T* out, const float* lse,
      T* grad_qkv) {
    const int64_t features = heads_.features, stride = heads_.qkv_stride();
    const T* q = qkv + heads_.qkv_offset(task.start, 0, task.head);
    const T* grad_out = grad + heads_.out_offset(task.start, task.head);
    products_with_out(grad_out, out + heads_.out_offset(task.start, task.head), task.length);
    const Pieces keys(task.length, kMostKeys, kKeysOfBlock);
    const Pieces queries(task.length, kBlockQueries, kTileRows);
    for (int64_t key = 0; key < task.length; key += keys.size) {
      const int64_t some = keys.length(key);
      const T* k = q + key * stride + heads_.out_stride();
      const T* v = k + heads_.out_stride();
      products_.set_keys(Rows<T>{k, stride, some}, Rows<T>{v, stride, some});
      for (int64_t query = 0; query < task.length; query += queries.size) {
        const int64_t rows = queries.length(query), row = (task.start + query) * heads_.count + task.head;
        const Rows<T> q_block{q + query * stride, stride, rows};
        const Rows<T> grad_block{grad_out + query * heads_.out_stride(), heads_.out_stride(), rows};
        products_.scores(q_block, p_);
        products_.value_products(grad_block, grad_p_);
        // inlined, or GCC takes a function that only prefetches for one that does nothing
        const auto prefetch_rows = [&](int64_t i) __attribute__((always_inline)) {
          if (key > 0) return;
          for (int64_t which = 0; which < 3; ++which) {
            prefetch<true>(grad_qkv + heads_.qkv_offset(task.start + query + i, which, task.head), features);
          }
          if (query + i >= next.length) return;
          for (int64_t which = 0; which < 3; ++which) {
            prefetch<false>(qkv + heads_.qkv_offset(next.start + query + i, which, next.head), features);
          }
          prefetch<false>(grad + heads_.out_offset(next.start + query + i, next.head), features);
          prefetch<false>(out + heads_.out_offset(next.start + query + i, next.head), features);
        };
        for_bool(dropout_.drops, [&](auto drops) {
          softmax_gradient<drops>(lse + row, deltas_ + query, row, rows, key, some, prefetch_rows);
        });
        products_.sum_grads(p_, grad_block, query > 0, grad_v_);
        products_.sum_queries(grad_p_, q_block, query > 0, grad_k_);
        products_.sum_rows(grad_p_, rows, key > 0, {grad_q_.row(query), grad_q_.stride});
      }
      write(grad_k_, scale_, some, grad_qkv + heads_.qkv_offset(task.start + key, 1, task.head));
      write(grad_v_, dropout_.scale, some, grad_qkv + heads_.qkv_offset(task.start + key, 2, task.head));
    }
    write(grad_q_, scale_, task.length, grad_qkv + heads_.qkv_offset(task.start, 0, task.head));
  }

 private:
  // D, the gradient's part in the direction of P
  template <class T>
  void products_with_out(const T* grad, const T* out, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row, grad += heads_.out_stride(), out += heads_.out_stride()) {
      Floats total{};
      for_vectors(heads_.features, [&](int64_t first, auto count) {
        total += load(grad + first, count) * load(out + first, count);
      });
      deltas_[row] = sum(total);
    }
  }

  // p_: S to dropout(P), but for its scale; grad_p_: dO V^T to dS.
  template <bool kDrops, class F>
  void softmax_gradient(
      const float* lse, const float* deltas, int64_t random_row, int64_t rows, int64_t key, int64_t keys,
      const F& before_row) {
    const int64_t row_bytes = dropout_.row_bytes(keys);
    if constexpr (kDrops) dropout_.draw_rows(random_row, heads_.count, rows, key, keys, drawn_.data());
    const float factor = scale_ * kLog2E;
    for (int64_t row = 0; row < rows; ++row) {
      before_row(row);
      const float offset = lse[row * heads_.count] * kLog2E, delta = deltas[row];
      float *p = p_.row(row), *grad_p = grad_p_.row(row);
      const int8_t* bytes = drawn_.data() + row * row_bytes + kKeysOfBlock - 1;
      for_vectors(keys, [&](int64_t first, auto) {
        const Floats x = exp2(load(p + first) * factor - offset);
        Floats slope = load(grad_p + first);
        if constexpr (kDrops) {
          const Ints kept = dropout_.kept(bytes + first);
          slope = select(kept, slope * dropout_.scale, Floats{});
          store(p + first, select(kept, x, Floats{}));
        } else {
          store(p + first, x);
        }
        store(grad_p + first, x * (slope - delta));
      });
    }
  }

  template <class T>
  void write(Matrix from, float factor, int64_t rows, T* to) const {
    for (int64_t row = 0; row < rows; ++row) {
      for_vectors(heads_.features, [&](int64_t first, auto count) {
        store(to + row * heads_.qkv_stride() + first, load(from.row(row) + first) * factor, count);
      });
    }
  }

  Heads heads_;
  float scale_;
  const ProbabilityDropout& dropout_;
  int64_t queries_, keys_;
  Products products_;
  Scratch scratch_;
  Matrix grad_q_, grad_k_, grad_v_, p_, grad_p_;
  float* deltas_;
  std::vector<int8_t> drawn_;
};

void attention_backward(
    const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
    double softmax_scale, std::optional<Tensor> state, int64_t stream, int64_t least_kept, double scale,
    const Tensor& grad_qkv) {
  const Heads heads{qkv.size(2), qkv.size(3)};
  const ProbabilityDropout dropout = probability_dropout_of(state, stream, least_kept, scale);
  const std::vector<Task> tasks =
      tasks_of(cu_seqlens, qkv.size(0), heads.count, std::numeric_limits<int32_t>::max());
  for_products(qkv, heads.features, [&]<class T, class Products>(T, std::type_identity<Products>) {
    const T *from = data<T>(qkv), *grad_from = data<T>(grad), *out_from = data<T>(out);
    const float* lse_from = data<float>(lse);
    T* to = data<T>(grad_qkv);
    for_tasks(tasks, [&](int64_t begin, int64_t end) {
      Backward<Products> backward(heads, static_cast<float>(softmax_scale), dropout, longest(tasks));
      for (int64_t i = begin; i < end; ++i) {
        const Task& next = tasks[std::min(i + 1, end - 1)];
        backward.run(tasks[i], next, grad_from, from, out_from, lse_from, to);
      }
    });
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, "
      "float softmax_scale, Tensor? state, int stream, int least_kept, float scale, Tensor(a!) grad_qkv) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&mage_fast::attention_backward));
}
