// The codes that one token may become: their scores, of which top-k and top-p leave some.
#pragma once

#include <numeric>

#include "tensors.h"
#include "vector_math.h"

namespace mage_fast {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Of a float's bits, an integer of the same order; its own inverse.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

inline int32_t order_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return ordered(bits);
}

inline float float_of(int32_t order) {
  const int32_t bits = ordered(order);
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// How logits become scores.
struct ScoreOptions {
  float guidance_scale, temperature;
  int64_t top_k;
  float top_p;
};

// One thread's memory for one row after the other.
class CodeRow {
 public:
  explicit CodeRow(int64_t codes)
      : codes_(codes), scores_(codes + kLanes), weights_(codes + kLanes), ids_(codes) {}

  // (logits + scale * (logits - guidance)) / temperature, rounded at each operation
  template <class T>
  void read(const T* logits, const T* guidance, const ScoreOptions& options) {
    size_ = codes_, is_filtered_ = false;
    pad();
    Floats largest = all(-kInfinity);
    Ints is_nan{};
    for_vectors(codes_, [&](int64_t first, auto count) {
      Floats x = load(logits + first, count);
      if (guidance != nullptr) x += rounded((x - load(guidance + first, count)) * options.guidance_scale);
      if (options.temperature != 1.0f) x /= options.temperature;
      store(scores_.data() + first, x + 0.0f, count);  // + 0: no -0, whose bits are below those of 0
      const Floats padded = load(scores_.data() + first);
      largest = max(padded, largest);
      is_nan |= padded != padded;
    });
    largest_ = max(largest), has_nan_ = any(is_nan);
  }

  // -infinity outside the k largest scores; those equal to the k-th stay.
  void keep_top_k(int64_t k) {
    const float least = reaching(static_cast<float>(k), [](int64_t) { return all(1.0f); }).low;
    keep_if([&](int64_t i) { return scores_[i] >= least; });
  }

  // The most probable codes, equal ones in the order of their ids, while the mass before them is below p.
  void keep_top_p(float p) {
    Floats total{};
    for (int64_t first = 0; first < size_; first += kLanes) {
      const Floats weight = exp(scores(first) - largest_);
      store(weights_.data() + first, weight);
      total += weight;
    }
    const float wanted = p * sum(total);
    const Edge edge = reaching(wanted, [&](int64_t first) { return load(weights_.data() + first); });
    double before = edge.above;
    keep_if([&](int64_t i) {
      if (scores_[i] < edge.low || scores_[i] >= edge.high) return scores_[i] >= edge.high;
      const bool stays = before < wanted;
      before += weights_[i];
      return stays;
    });
  }

  // No NaN, and the largest score finite.
  bool is_ordinary() const { return !has_nan_ && largest_ > -kInfinity && largest_ < kInfinity; }

  // The first largest code of a row that is not ordinary: NaN is above all.
  int64_t extreme() const {
    int64_t code = 0;
    while (has_nan_ ? scores_[code] == scores_[code] : scores_[code] != largest_) ++code;
    return code;
  }

  int64_t codes() const { return codes_; }  // before they were filtered
  int64_t size() const { return size_; }
  bool is_filtered() const { return is_filtered_; }
  float largest() const { return largest_; }
  float score(int64_t i) const { return scores_[i]; }
  int64_t id(int64_t i) const { return is_filtered_ ? ids_[i] : i; }
  // A whole vector of them; beyond the last one -infinity.
  Floats scores(int64_t first) const { return load(scores_.data() + first); }

 private:
  struct Edge {
    float low, high, above;
  };

  // The weights of all scores not below `low` reach `wanted`; of those not below `high` they are `above`,
  // less than it. Between the two there is a single score or several equal ones. Bisects the floats.
  template <class Weight>
  Edge reaching(float wanted, const Weight& weight) const {
    int64_t low = order_of(-kInfinity), high = int64_t{order_of(largest_)} + 1;
    int64_t count_low = size_, count_high = 0;
    float above = 0.0f;
    while (count_low - count_high > 1 && high - low > 1) {
      const int64_t middle = (low + high) >> 1;
      const Floats least = all(float_of(static_cast<int32_t>(middle)));
      Floats weights{}, counts{};
      for (int64_t first = 0; first < size_; first += kLanes) {
        const Ints is_in = scores(first) >= least;
        weights += select(is_in, weight(first), Floats{});
        counts += select(is_in, all(1.0f), Floats{});
      }
      const int64_t count = static_cast<int64_t>(sum(counts));
      const float reached = sum(weights);
      if (reached >= wanted) {
        low = middle, count_low = count;
      } else {
        high = middle, count_high = count, above = reached;
      }
    }
    return {float_of(static_cast<int32_t>(low)), float_of(static_cast<int32_t>(high)), above};
  }

  template <class Stays>
  void keep_if(const Stays& stays) {
    if (!is_filtered_) std::iota(ids_.begin(), ids_.end(), 0);
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const bool stays_here = stays(i);
      scores_[kept] = scores_[i], ids_[kept] = ids_[i];
      kept += stays_here;
    }
    size_ = kept, is_filtered_ = true;
    pad();
  }

  void pad() { std::fill_n(scores_.begin() + size_, kLanes, -kInfinity); }

  int64_t codes_, size_ = 0;
  float largest_ = 0.0f;
  bool has_nan_ = false, is_filtered_ = false;
  std::vector<float> scores_, weights_;
  std::vector<int32_t> ids_;
};

}  // namespace mage_fast
