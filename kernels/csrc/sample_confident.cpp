// sample_confident: one step of iterative decoding. First every unknown token draws an id; a token's row of
// logits is one thread's, and those of known tokens are not read. Then every sample, one thread's too, masks
// its least confident tokens again.
#include <cmath>

#include "code_row.h"

namespace mage_fast {
namespace {

// 2^23 times the uniform number of a word: its top 23 bits and a half.
Floats uniform_units(Words words) { return __builtin_convertvector(words >> 9, Floats) + 0.5f; }
constexpr float kUnit = 1.0f / 8388608.0f;

// An exponential variate of a uniform one; of that, Gumbel noise.
Floats minus_log(Floats x) { return -log(x); }

// Memory for `count` words from any element on, drawn in whole vectors of blocks and read in whole vectors.
std::vector<int32_t> words_for(int64_t count) {
  return std::vector<int32_t>(count + 8 + 4 * kBlocks + kLanes);
}

struct Drawn {
  int64_t code;
  float log_p;
};

// argmax of score + Gumbel noise, the first of equal ones; code c's noise is the sample's number first + c.
//
// It is a race too: with p = e^score and the exponential variate t = -log u the largest sum has the least
// t / p. As t >= 1 - u, no code wins whose 1 - u is above p times the least t / p so far, and its logarithms
// need not be taken. The margin is for what is rounded off, the sums at the size of the scores.
Drawn draw(
    const CodeRow& row, const Philox& philox, uint64_t sample, int64_t first, std::vector<int32_t>& buffer) {
  const int64_t offset = first % 4;
  fill_blocks(philox, sample, first / 4, (offset + row.codes() + 3) / 4, buffer.data());
  int32_t* words = buffer.data() + offset;
  if (row.is_filtered()) {
    for (int64_t i = 0; i < row.size(); ++i) words[i] = words[row.id(i)];
  }
  const float margin = std::exp(1e-5f + std::abs(row.largest()) * 5e-7f) / kUnit;
  float bound = kInfinity;
  Floats best = all(-kInfinity), total{};
  Ints winner{};
  for (int64_t i = 0; i < row.size(); i += kLanes) {
    const Floats score = row.scores(i), p = exp(score - row.largest());
    total += p;
    const Floats u = uniform_units(load_as<Words>(words + i));
    if (!any(1.0f / kUnit - u <= p * bound)) continue;
    const Floats t = minus_log(u * kUnit), sum = score + minus_log(t);
    const Ints is_better = sum > best;
    best = select(is_better, sum, best);
    winner = select(is_better, lane_numbers() + static_cast<int32_t>(i), winner);
    bound = std::min(bound, reduce(t / p, [](Floats a, Floats b) { return min(a, b); }) * margin);
  }
  const float highest = max(best);
  int64_t drawn = row.size();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (best[lane] == highest) drawn = std::min<int64_t>(drawn, winner[lane]);
  }
  return {row.id(drawn), row.score(drawn) - row.largest() - log(all(sum(total)))[0]};
}

template <class T>
void draw_unknown(
    const T* logits, const T* guidance, int64_t count, const int64_t* rows, const int64_t* ids, int64_t batch,
    int64_t length, int64_t codes, int64_t mask_token_id, const ScoreOptions& options, const Philox& philox,
    const int64_t* samples, int64_t* sampled, float* log_p) {
  std::vector<int64_t> unknown;
  for (int64_t token = 0; token < batch * length; ++token) {
    sampled[token] = ids[token];
    if (ids[token] != mask_token_id) continue;
    unknown.push_back(token);
    const int64_t row = rows ? rows[token] : token;
    STD_TORCH_CHECK(0 <= row && row < count, "sample_confident: row ", row, " of ", count, " rows of logits");
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(unknown.size()), 4, [&](int64_t begin, int64_t end) {
    CodeRow row(codes);
    std::vector<int32_t> words = words_for(codes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = unknown[i], element = (rows ? rows[token] : token) * codes;
      row.read(logits + element, guidance ? guidance + element : nullptr, options);
      if (!row.is_ordinary()) {
        sampled[token] = row.extreme();
        log_p[token] = std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      if (0 < options.top_k && options.top_k < codes) row.keep_top_k(options.top_k);
      if (options.top_p < 1.0f) row.keep_top_p(options.top_p);
      const uint64_t sample = samples[token / length];
      const Drawn drawn = draw(row, philox, sample, token % length * codes, words);
      sampled[token] = drawn.code;
      log_p[token] = drawn.log_p;
    }
  });
}

// Of one sample, the tokens of least log_p + choice_temperature * noise; known ones are sure.
void mask_least_confident(
    const int64_t* ids, const float* log_p, int64_t length, int64_t num_masked, int64_t mask_token_id,
    float choice_temperature, const Philox& philox, uint64_t sample, int64_t* next) {
  std::vector<int32_t> words = words_for(length);
  fill_blocks(philox, sample, 0, (length + 3) / 4, words.data());
  std::vector<uint64_t> ranked(length);  // confidence, then place
  int64_t unknown = 0;
  for_vectors(length, [&](int64_t first, auto count) {
    const Floats u = uniform_units(load_as<Words>(words.data() + first)) * kUnit;
    const Floats noise = minus_log(minus_log(u));
    const Floats confidence = load(log_p + first, count) + rounded(noise * choice_temperature) + 0.0f;
    for (int lane = 0; lane < count; ++lane) {
      const int64_t token = first + lane;
      const bool is_unknown = ids[token] == mask_token_id;
      unknown += is_unknown;
      // NaN is above infinity, as in torch's sort
      const float sure = is_unknown ? confidence[lane] : kInfinity;
      const int32_t order = sure == sure ? order_of(sure) : std::numeric_limits<int32_t>::max();
      ranked[token] = (static_cast<uint64_t>(static_cast<uint32_t>(order) ^ 0x80000000u) << 32) | token;
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
    const Tensor& logits, const Tensor& ids, const Tensor& num_masked, std::optional<Tensor> rows,
    std::optional<Tensor> guidance, double guidance_scale, int64_t mask_token_id, double choice_temperature,
    double temperature, int64_t top_k, double top_p, const Tensor& samples, const Tensor& state,
    int64_t id_stream, int64_t confidence_stream, const Tensor& sampled, const Tensor& next) {
  const int64_t batch = ids.size(0), length = ids.size(1), codes = logits.size(logits.dim() - 1);
  const ScoreOptions options{
      static_cast<float>(guidance_scale), static_cast<float>(temperature), top_k, static_cast<float>(top_p)};
  const int64_t *ids_in = data<int64_t>(ids), *counts = data<int64_t>(num_masked);
  const int64_t *rows_in = data<int64_t>(rows), *numbers = data<int64_t>(samples);
  int64_t *ids_out = data<int64_t>(sampled), *next_out = data<int64_t>(next);
  std::vector<float> log_p(batch * length);
  for_dtype(logits, [&]<class T>(T) {
    draw_unknown(
        data<T>(logits), data<T>(guidance), logits.numel() / codes, rows_in, ids_in, batch, length, codes,
        mask_token_id, options, philox_of(state, id_stream), numbers, ids_out, log_p.data());
  });
  const Philox philox = philox_of(state, confidence_stream);
  parallel(batch, 1, [&](int64_t sample) {
    const int64_t first = sample * length;
    std::copy_n(ids_out + first, length, next_out + first);
    mask_least_confident(
        ids_in + first, log_p.data() + first, length, counts[sample], mask_token_id,
        static_cast<float>(choice_temperature), philox, numbers[sample], next_out + first);
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "sample_confident(Tensor logits, Tensor ids, Tensor num_masked, Tensor? rows, Tensor? guidance, "
      "float guidance_scale, int mask_token_id, float choice_temperature, float temperature, int top_k, "
      "float top_p, Tensor samples, Tensor state, int id_stream, int confidence_stream, "
      "Tensor(a!) sampled, Tensor(b!) next) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("sample_confident", TORCH_BOX(&mage_fast::sample_confident));
}
