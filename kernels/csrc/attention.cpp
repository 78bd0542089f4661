// attention, forward: O = dropout(softmax(scale Q K^T)) V within each sequence of a packed batch.
//
// A task is a head of a sequence (a few hundred queries of it). It lays out its keys and values in the cache
// (attention_products.h); a block of queries at a time, it has the scores of all keys (of kMostKeys of them, if
// the sequence is longer) beside them, makes them probabilities in place and multiplies by V.
// Probabilities have their row's maximum taken off, and are divided by their sum at the very end.
#include "attention.h"

#include <cmath>
#include <limits>

#include "attention_products.h"
#include "vector_math.h"

namespace mage_fast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kTaskQueries = 288, kBlockQueries = 48;

template <class Products>
class Forward {
 public:
  Forward(Heads heads, float scale, const ProbabilityDropout& dropout, int64_t longest)
      : heads_(heads), scale_(scale), dropout_(dropout), most_keys_(std::min(longest, kMostKeys)),
        most_queries_(std::min(longest, kTaskQueries)),
        products_(heads.features, most_keys_, kBlockQueries, false),
        scratch_(
            Scratch::room(kBlockQueries, most_keys_) + Scratch::room(most_queries_, heads.features) +
            2 * Scratch::room(most_queries_)),
        p_(scratch_.take(kBlockQueries, most_keys_)),
        out_(scratch_.take(most_queries_, heads.features)), maxima_(scratch_.take(most_queries_)),
        totals_(scratch_.take(most_queries_)),
        drawn_(dropout.drops ? dropout.room(kBlockQueries, most_keys_) : 0) {}

  template <class T>
  void run(const Task& task, const Task& next, const T* qkv, T* out, float* lse) {
    const int64_t features = heads_.features, row = task.start + task.first;
    const Pieces keys(task.length, kMostKeys, kKeysOfBlock), queries(task.queries, kBlockQueries, kTileRows);
    for (int64_t key = 0; key < task.length; key += keys.size) {
      const int64_t some = keys.length(key), stride = heads_.qkv_stride();
      const T* k = qkv + heads_.qkv_offset(task.start + key, 1, task.head);
      products_.set_keys(Rows<T>{k, stride, some}, Rows<T>{k + heads_.out_stride(), stride, some});
      for (int64_t query = 0; query < task.queries; query += queries.size) {
        const int64_t rows = queries.length(query);
        const T* q = qkv + heads_.qkv_offset(row + query, 0, task.head);
        products_.scores(Rows<T>{q, stride, rows}, p_);
        // inlined, or GCC takes a function that only prefetches for one that does nothing
        const auto prefetch_rows = [&](int64_t i) __attribute__((always_inline)) {
          if (key > 0) return;
          prefetch<true>(out + heads_.out_offset(row + i, task.head), features);
          for (int64_t which = 0; which < 3 && i < next.length; ++which) {
            prefetch<false>(qkv + heads_.qkv_offset(next.start + i, which, next.head), features);
          }
        };
        for_bool(dropout_.drops, [&](auto drops) {
          const int64_t random_row = (row + query) * heads_.count + task.head;
          softmax<drops>(query, rows, random_row, key, some, prefetch_rows);
        });
        products_.sum_rows(p_, rows, key > 0, {out_.row(query), out_.stride});
      }
    }
    for (int64_t query = 0; query < task.queries; ++query) {
      const float factor = dropout_.scale / totals_[query];
      T* to = out + heads_.out_offset(row + query, task.head);
      for_vectors(features, [&](int64_t first, auto count) {
        store(to + first, load(out_.row(query) + first) * factor, count);
      });
      const float maximum = maxima_[query] * std::abs(scale_);
      lse[(row + query) * heads_.count + task.head] = maximum + std::log(totals_[query]);
    }
  }

 private:
  // Scores to probabilities, but for the division by their sum, which goes to totals_. What earlier keys
  // have summed is brought to the new maximum.
  template <bool kDrops, class F>
  void softmax(
      int64_t query, int64_t rows, int64_t random_row, int64_t key, int64_t keys, const F& before_row) {
    const bool is_first = key == 0;
    const int64_t row_bytes = dropout_.row_bytes(keys);
    if constexpr (kDrops) dropout_.draw_rows(random_row, heads_.count, rows, key, keys, drawn_.data());
    // a negative scale makes the least product the greatest score
    const float sign = std::copysign(1.0f, scale_), factor = scale_ * kLog2E;
    float before[kBlockQueries];
    for (int64_t row = 0; row < rows; ++row) {
      Floats most = all(-kInfinity);
      for_vectors(keys, [&](int64_t first, auto count) {
        most = max(first_lanes(load(p_.row(row) + first) * sign, count, -kInfinity), most);
      });
      before[row] = is_first ? -kInfinity : maxima_[query + row];
      maxima_[query + row] = std::max(max(most), before[row]);
    }
    for (int64_t row = 0; row < rows; ++row) {
      before_row(query + row);
      // where all scores are -infinity they stay so: probabilities are 0, and 0 / 0 in the end
      const float maximum = maxima_[query + row];
      const float offset = maximum == -kInfinity ? 0.0f : maximum * sign * factor;
      Floats total{};
      float* p = p_.row(row);
      const int8_t* bytes = drawn_.data() + row * row_bytes + kKeysOfBlock - 1;
      for_vectors(keys, [&](int64_t first, auto count) {
        const Floats x = exp2(load(p + first) * factor - offset);
        total += first_lanes(x, count, 0.0f);
        if constexpr (kDrops) {
          store(p + first, select(dropout_.kept(bytes + first), x, Floats{}));
        } else {
          store(p + first, x);
        }
      });
      if (is_first) {
        totals_[query + row] = sum(total);
      } else {
        const float change = std::exp2(before[row] * sign * factor - offset);
        totals_[query + row] = totals_[query + row] * change + sum(total);
        for_vectors(whole_vectors(heads_.features), [&](int64_t first, auto) {
          float* to = out_.row(query + row) + first;
          store(to, load(to) * change);
        });
      }
    }
  }

  Heads heads_;
  float scale_;
  const ProbabilityDropout& dropout_;
  int64_t most_keys_, most_queries_;
  Products products_;
  Scratch scratch_;
  Matrix p_, out_;
  float *maxima_, *totals_;
  std::vector<int8_t> drawn_;
};

void attention(
    const Tensor& qkv, const Tensor& cu_seqlens, double softmax_scale, std::optional<Tensor> state,
    int64_t stream, int64_t least_kept, double scale, const Tensor& out, const Tensor& lse) {
  const Heads heads{qkv.size(2), qkv.size(3)};
  const ProbabilityDropout dropout = probability_dropout_of(state, stream, least_kept, scale);
  const std::vector<Task> tasks = tasks_of(cu_seqlens, qkv.size(0), heads.count, kTaskQueries);
  float* to_lse = data<float>(lse);
  for_products(qkv, heads.features, [&]<class T, class Products>(T, std::type_identity<Products>) {
    const T* from = data<T>(qkv);
    T* to = data<T>(out);
    for_tasks(tasks, [&](int64_t begin, int64_t end) {
      Forward<Products> forward(heads, static_cast<float>(softmax_scale), dropout, longest(tasks));
      for (int64_t i = begin; i < end; ++i) {
        forward.run(tasks[i], tasks[std::min(i + 1, end - 1)], from, to, to_lse);
      }
    });
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "attention(Tensor qkv, Tensor cu_seqlens, float softmax_scale, Tensor? state, int stream, "
      "int least_kept, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) { m.impl("attention", TORCH_BOX(&mage_fast::attention)); }
