// The gradient of a table whose rows were gathered: each row of the table sums those that were read from it,
// in their order, so the sums have the same bits whatever the number of threads.
#pragma once

#include "tensors.h"

namespace mage_fast {

// Rows sorted by key, those of equal keys in their order (a counting sort).
class RowsByKey {
 public:
  // Every key is in [0, count).
  RowsByKey(const std::vector<int64_t>& keys, int64_t count) : starts_(count + 1), rows_(keys.size()) {
    for (const int64_t key : keys) ++starts_[key + 1];
    for (int64_t key = 0; key < count; ++key) starts_[key + 1] += starts_[key];
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (size_t row = 0; row < keys.size(); ++row) rows_[next[keys[row]]++] = row;
  }

  int64_t keys() const { return starts_.size() - 1; }
  int64_t rows() const { return rows_.size(); }
  const int64_t* begin(int64_t key) const { return rows_.data() + starts_[key]; }
  const int64_t* end(int64_t key) const { return rows_.data() + starts_[key + 1]; }

 private:
  std::vector<int64_t> starts_, rows_;
};

// use(key, first, sum, count) for every vector of every key's sum of `features` elements, 0 for a key without
// rows. A key is a task; one with a large part of all rows, as [M] has, is several, of some columns each.
template <class T, class Use>
void sum_by_key(const T* rows, int64_t features, const RowsByKey& of, const Use& use) {
  const auto sum_columns = [&](int64_t key, int64_t from, int64_t to) {
    constexpr int64_t kVectors = 8;  // summed at a time, in registers: rows are read in long pieces
    for (; from + kVectors * kLanes <= to; from += kVectors * kLanes) {
      Floats sums[kVectors] = {};
      for (const int64_t* row = of.begin(key); row < of.end(key); ++row) {
        const T* const summand = rows + *row * features + from;
        for (int64_t i = 0; i < kVectors; ++i) sums[i] += load(summand + i * kLanes);
      }
      constexpr std::integral_constant<int64_t, kLanes> count;
      for (int64_t i = 0; i < kVectors; ++i) use(key, from + i * kLanes, sums[i], count);
    }
    for_vectors(to - from, [&](int64_t first, auto count) {
      Floats sum{};
      for (const int64_t* row = of.begin(key); row < of.end(key); ++row) {
        sum += load(rows + *row * features + from + first, count);
      }
      use(key, from + first, sum, count);
    });
  };
  const int64_t many = std::max<int64_t>(16, of.rows() / 16);
  std::vector<int64_t> large;
  for (int64_t key = 0; key < of.keys(); ++key) {
    if (of.end(key) - of.begin(key) > many) large.push_back(key);
  }
  parallel(of.keys(), rows_of_task(features), [&](int64_t key) {
    if (of.end(key) - of.begin(key) <= many) sum_columns(key, 0, features);
  });
  constexpr int64_t kColumns = 128;
  const int64_t pieces = (features + kColumns - 1) / kColumns;
  parallel(large.size() * pieces, 1, [&](int64_t task) {
    const int64_t from = task % pieces * kColumns;
    sum_columns(large[task / pieces], from, std::min(features, from + kColumns));
  });
}

}  // namespace mage_fast
