// sample_confident: one step of iterative decoding. First every unknown token draws an id; a token's row of
// logits is one thread's, and those of known tokens are not read. Then every sample, one thread's too, masks
// its least confident tokens again.
#include <numeric>

#include "tensors.h"
#include "vector_math.h"

namespace mage_fast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^23 times the uniform number of a word: its top 23 bits plus a half.
Floats uniform(Words words) { return __builtin_convertvector(words >> 9, Floats) + 0.5f; }

// -log(u), an exponential variate; of it again: Gumbel noise
Floats minus_log(Floats u) { return -log(u); }

constexpr float kUniformUnit = 1.0f / 8388608.0f;

struct Options {
  float guidance_scale, temperature;
  int64_t top_k;
  float top_p;
};

// The codes that a token may still become, and what is drawn from them. One is made for each thread.
class Row {
 public:
  explicit Row(int64_t codes) : codes_(codes), x_(codes + kLanes), weights_(codes + kLanes), ids_(codes),
                                words_(codes + 4 * kBlocks + 8 + kLanes) {}

  // x = (logits + scale (logits - guidance)) / temperature, rounded at each operation
  template <class T>
  void read(const T* logits, const T* guidance, const Options& options);
  // True unless the largest logit is infinite or there is a NaN: then one of those is drawn, `exception()`.
  bool is_ordinary() const { return !has_nan_ && largest_ > -kInfinity && largest_ < kInfinity; }
  int64_t exception() const;

  void keep_top_k(int64_t k);
  void keep_top_p(float p);

  struct Drawn {
    int64_t code;
    float log_p;
  };
  // argmax of x + Gumbel noise; the noise of code c is element first_element + c of the sample.
  Drawn draw(const Philox& philox, uint64_t sample, int64_t first_element);

 private:
  struct Bracket {
    float low, high, above;
  };
  template <class Weight>
  Bracket reaching(float wanted, const Weight& weight) const;
  template <class Stays>
  void keep_if(const Stays& stays);
  void pad() { std::fill_n(x_.begin() + size_, kLanes, -kInfinity); }

  int64_t codes_, size_ = 0;
  float largest_ = 0.0f;
  bool has_nan_ = false, is_filtered_ = false;
  std::vector<float> x_, weights_;  // x_: padded with -infinity to whole vectors
  std::vector<int32_t> ids_, words_;
};

template <class T>
void Row::read(const T* logits, const T* guidance, const Options& options) {
  Floats largest = all(-kInfinity);
  Ints nan{};
  for_vectors(codes_, [&](int64_t first, auto count) {
    Floats x = load(logits + first, count);
    if (guidance) x += rounded((x - load(guidance + first, count)) * options.guidance_scale);
    if (options.temperature != 1.0f) x /= options.temperature;
    x += 0.0f;  // no -0, whose bits differ from those of 0
    largest = max(count == kLanes ? x : select(lane_numbers() < static_cast<int32_t>(count), x, largest), largest);
    nan |= x != x;
    store(x_.data() + first, x, count);
  });
  size_ = codes_, is_filtered_ = false;
  largest_ = max(largest), has_nan_ = any(nan);
  pad();
}

int64_t Row::exception() const {
  int64_t code = 0;
  while (has_nan_ ? x_[code] == x_[code] : x_[code] != largest_) ++code;
  return code;
}

// Of a float's bits, an integer of the same order; its own inverse.
int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }
int32_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return ordered(bits);
}
float float_of(int32_t key) {
  const int32_t bits = ordered(key);
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Of all x not below `low` the weights reach `wanted`, of those not below `high` they are `above`, less than
// it. Between the two is one value of x, or nothing more is to be told apart. Bisects the floats.
template <class Weight>
Row::Bracket Row::reaching(float wanted, const Weight& weight) const {
  int32_t low = key_of(-kInfinity), high = key_of(largest_) + 1;
  int32_t count_low = static_cast<int32_t>(size_), count_high = 0;
  float above = 0.0f;
  while (count_low - count_high > 1 && static_cast<int64_t>(high) - low > 1) {
    const int32_t middle = static_cast<int32_t>((static_cast<int64_t>(low) + high) >> 1);
    const Floats least = all(float_of(middle));
    Floats sums{};
    Ints counts{};
    for (int64_t first = 0; first < size_; first += kLanes) {
      const Ints is_in = load(x_.data() + first) >= least;
      counts -= is_in;
      sums += select(is_in, weight(first), Floats{});
    }
    const int32_t count = static_cast<int32_t>(sum(__builtin_convertvector(counts, Floats)));
    const float mass = sum(sums);
    if (mass >= wanted) {
      low = middle, count_low = count;
    } else {
      high = middle, count_high = count, above = mass;
    }
  }
  return {float_of(low), float_of(high), above};
}

template <class Stays>
void Row::keep_if(const Stays& stays) {
  if (!is_filtered_) std::iota(ids_.begin(), ids_.end(), 0);
  int64_t kept = 0;
  for (int64_t i = 0; i < size_; ++i) {
    const bool is_in = stays(i);
    x_[kept] = x_[i], ids_[kept] = ids_[i];
    kept += is_in;
  }
  size_ = kept, is_filtered_ = true;
  pad();
}

void Row::keep_top_k(int64_t k) {
  const float least = reaching(static_cast<float>(k), [](int64_t) { return all(1.0f); }).low;
  keep_if([&](int64_t i) { return x_[i] >= least; });
}

// The most probable codes, those of equal probability in the order of their ids, while the mass before is < p
void Row::keep_top_p(float p) {
  Floats total{};
  for (int64_t first = 0; first < size_; first += kLanes) {
    const Floats weight = exp_of_difference(load(x_.data() + first) - largest_);
    store(weights_.data() + first, weight);
    total += weight;
  }
  const float wanted = p * sum(total);
  const Bracket edge = reaching(wanted, [&](int64_t first) { return load(weights_.data() + first); });
  double before = edge.above;
  keep_if([&](int64_t i) {
    if (x_[i] < edge.low || x_[i] >= edge.high) return x_[i] >= edge.high;
    const bool is_in = before < wanted;
    before += weights_[i];
    return is_in;
  });
}

Row::Drawn Row::draw(const Philox& philox, uint64_t sample, int64_t first_element) {
  const int64_t offset = first_element % 4;
  fill_blocks(philox, sample, first_element / 4, (offset + codes_ + 3) / 4, words_.data());
  int32_t* words = words_.data() + offset;
  if (is_filtered_) {
    for (int64_t i = 0; i < size_; ++i) words[i] = words[ids_[i]];
  }
  // A race: with e^x = p and -log u = t, x + noise is the larger, the smaller t / p. As t >= 1 - u, where
  // 1 - u is beyond p times the best t / p yet nothing can win, and the logarithms need not be taken. The
  // margin is for what is rounded off, x + noise at the size of x.
  const float margin = exp(all(1e-5f + std::abs(largest_) * 5e-7f))[0] / kUniformUnit;
  float bound = kInfinity;
  Floats best = all(-kInfinity), total{};
  Ints winner{};
  for (int64_t first = 0; first < size_; first += kLanes) {
    const Floats x = load(x_.data() + first), p = exp_of_difference(x - largest_);
    total += p;
    const Floats u = uniform(load_as<Words>(words + first));
    if (!any(1.0f / kUniformUnit - u <= p * bound)) continue;
    const Floats t = minus_log(u * kUniformUnit), score = x + minus_log(t);
    const Ints is_better = score > best;
    best = select(is_better, score, best);
    winner = select(is_better, lane_numbers() + static_cast<int32_t>(first), winner);
    bound = std::min(bound, reduce(t / p, [](Floats a, Floats b) { return min(a, b); }) * margin);
  }
  int64_t drawn = winner[0];
  float highest = best[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    if (best[lane] > highest || (best[lane] == highest && winner[lane] < drawn)) {
      highest = best[lane], drawn = winner[lane];
    }
  }
  const float log_p = x_[drawn] - largest_ - log(all(sum(total)))[0];
  return {is_filtered_ ? ids_[drawn] : drawn, log_p};
}

template <class T>
void draw_unknown(
    const T* logits, const T* guidance, const int64_t* ids, int64_t batch, int64_t length, int64_t codes,
    int64_t mask_token_id, const Options& options, const Philox& philox, int64_t first_sample,
    int64_t* sampled, float* log_p) {
  std::vector<int64_t> unknown;
  for (int64_t token = 0; token < batch * length; ++token) {
    sampled[token] = ids[token];
    if (ids[token] == mask_token_id) unknown.push_back(token);
  }
  torch::stable::parallel_for(0, unknown.size(), 4, [&](int64_t begin, int64_t end) {
    Row row(codes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = unknown[i], element = token * codes;
      row.read(logits + element, guidance ? guidance + element : nullptr, options);
      if (!row.is_ordinary()) {
        sampled[token] = row.exception();
        log_p[token] = std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      if (0 < options.top_k && options.top_k < codes) row.keep_top_k(options.top_k);
      if (options.top_p < 1.0f) row.keep_top_p(options.top_p);
      const Row::Drawn drawn = row.draw(philox, first_sample + token / length, token % length * codes);
      sampled[token] = drawn.code;
      log_p[token] = drawn.log_p;
    }
  });
}

// Of one sample, the tokens of least log_p + choice_temperature * noise; known ones are sure.
void mask_least_confident(
    const int64_t* ids, const float* log_p, int64_t length, int64_t num_masked, int64_t mask_token_id,
    float choice_temperature, const Philox& philox, uint64_t sample, int64_t* next) {
  std::vector<int32_t> words(length + 4 * kBlocks + kLanes);
  fill_blocks(philox, sample, 0, (length + 3) / 4, words.data());
  std::vector<uint64_t> ranked(length);  // confidence, then place
  int64_t unknown = 0;
  for_vectors(length, [&](int64_t first, auto count) {
    const Floats u = uniform(load_as<Words>(words.data() + first)) * kUniformUnit;
    const Floats noise = minus_log(minus_log(u));
    const Floats confidence = load(log_p + first, count) + rounded(noise * choice_temperature) + 0.0f;
    for (int lane = 0; lane < count; ++lane) {
      const int64_t token = first + lane;
      const bool is_unknown = ids[token] == mask_token_id;
      unknown += is_unknown;
      // NaN is above infinity, as in torch's sort
      const float sure = is_unknown ? confidence[lane] : kInfinity;
      const int32_t key = sure == sure ? key_of(sure) : std::numeric_limits<int32_t>::max();
      ranked[token] = (static_cast<uint64_t>(static_cast<uint32_t>(key) ^ 0x80000000u) << 32) | token;
    }
  });
  const int64_t count = std::min(length, std::max<int64_t>(1, std::min(num_masked, unknown - 1)));
  std::nth_element(ranked.begin(), ranked.begin() + count, ranked.end());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = ranked[i] & 0xFFFFFFFFu;
    if (ids[token] == mask_token_id) next[token] = mask_token_id;
  }
}

void sample_confident(
    const Tensor& logits, const Tensor& ids, const Tensor& num_masked, std::optional<Tensor> guidance,
    double guidance_scale, int64_t mask_token_id, double choice_temperature, double temperature,
    int64_t top_k, double top_p, const Tensor& state, int64_t id_stream, int64_t confidence_stream,
    int64_t first_sample, const Tensor& sampled, const Tensor& next) {
  const int64_t batch = logits.size(0), length = logits.size(1), codes = logits.size(2);
  STD_TORCH_CHECK(codes < (int64_t{1} << 24), "mage_fast_cpu: ", codes, " codes");
  const Options options{
      static_cast<float>(guidance_scale), static_cast<float>(temperature), top_k, static_cast<float>(top_p)};
  const int64_t *ids_in = data<int64_t>(ids), *counts = data<int64_t>(num_masked);
  int64_t *ids_out = data<int64_t>(sampled), *next_out = data<int64_t>(next);
  std::vector<float> log_p(batch * length);
  for_dtype(logits, [&]<class T>(T) {
    draw_unknown(
        data<T>(logits), data<T>(guidance), ids_in, batch, length, codes, mask_token_id, options,
        philox_of(state, id_stream), first_sample, ids_out, log_p.data());
  });
  const Philox philox = philox_of(state, confidence_stream);
  parallel(batch, 1, [&](int64_t sample) {
    const int64_t first = sample * length;
    std::copy_n(ids_out + first, length, next_out + first);
    mask_least_confident(
        ids_in + first, log_p.data() + first, length, counts[sample], mask_token_id,
        static_cast<float>(choice_temperature), philox, first_sample + sample, next_out + first);
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "sample_confident(Tensor logits, Tensor ids, Tensor num_masked, Tensor? guidance, "
      "float guidance_scale, int mask_token_id, float choice_temperature, float temperature, int top_k, "
      "float top_p, Tensor state, int id_stream, int confidence_stream, int first_sample, "
      "Tensor(a!) sampled, Tensor(b!) next) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("sample_confident", TORCH_BOX(&mage_fast::sample_confident));
}
