// mask_plan: which tokens of each sample are masked and dropped, and the packed indices that say so. Tokens
// are in the order of their random words, those of equal words in the order of their positions. No sort: a
// sample's first `count` tokens are those with words below a cut, which is found bit by bit. A thread takes a
// sample at a time; where its results start is known from the counts.
#include <limits>

#include "tensors.h"

namespace mage_fast {
namespace {

// The first tokens of the random order: those whose word is below `word`, and `ties` of those that have it.
struct Cut {
  int32_t word;
  int64_t ties;
};

// Random words, from the unsigned to the signed order; filled up with the largest to whole vectors.
void draw_words(const Philox& philox, int64_t sample, int64_t length, std::vector<int32_t>& words) {
  const int64_t blocks = (length + 3) / 4;
  words.resize((blocks + kBlocks) * 4 + kLanes);
  fill_blocks(philox, sample, 0, blocks, words.data());
  for (int64_t first = 0; first < length; first += kLanes) {
    const Ints flipped = load_as<Ints>(words.data() + first) ^ std::numeric_limits<int32_t>::min();
    const Ints is_inside = lane_numbers() < static_cast<int32_t>(std::min<int64_t>(length - first, kLanes));
    const Ints ordered = select(is_inside, flipped, all(std::numeric_limits<int32_t>::max()));
    std::memcpy(words.data() + first, &ordered, sizeof(ordered));
  }
}

int64_t count_below(const int32_t* words, int64_t length, int32_t word) {
  Ints counts{};
  for (int64_t first = 0; first < length; first += kLanes) {
    counts -= load_as<Ints>(words + first) < word;
  }
  return sum(counts);
}

Cut find_cut(const int32_t* words, int64_t length, int64_t count) {
  // the greatest word, as an unsigned number, with fewer than `count` below it
  constexpr uint32_t kSign = uint32_t{1} << 31;
  uint32_t cut = 0;
  for (uint32_t bit = kSign; bit != 0; bit >>= 1) {
    const int32_t word = static_cast<int32_t>((cut | bit) ^ kSign);
    const int64_t below = count_below(words, length, word);
    if (below == count) return {word, 0};
    if (below < count) cut |= bit;
  }
  const int32_t word = static_cast<int32_t>(cut ^ kSign);
  return {word, count - count_below(words, length, word)};
}

// Copies what fits: totals that the counts do not give never write outside.
void copy_inside(const std::vector<int32_t>& from, int64_t count, int64_t start, int64_t size, int32_t* to) {
  count = std::min(count, size - start);
  if (count > 0) std::copy_n(from.data(), count, to + start);
}

struct Plan {
  int32_t *positions, *cu_seqlens, *masked_index, *source;
  bool* is_masked;
  int32_t *visible, *visible_cu_seqlens;
  int64_t total_kept, total_masked, total_visible;
};

void plan_samples(
    const Philox& philox, const std::vector<int64_t>& masked, const std::vector<int64_t>& dropped,
    int64_t length, const Plan& plan) {
  const int64_t batch = static_cast<int64_t>(masked.size());
  std::vector<int64_t> first_row(batch + 1), first_masked(batch + 1), first_visible(batch + 1);
  for (int64_t b = 0; b < batch; ++b) {
    first_row[b + 1] = first_row[b] + 1 + length - dropped[b];
    first_masked[b + 1] = first_masked[b] + masked[b];
    first_visible[b + 1] = first_visible[b] + 1 + length - masked[b];
  }
  std::copy(first_row.begin(), first_row.end(), plan.cu_seqlens);
  std::copy(first_visible.begin(), first_visible.end(), plan.visible_cu_seqlens);
  const int64_t grain = 1 + 4096 / std::max<int64_t>(length, 1);  // samples worth a thread of their own
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> words, rows(length + 1), index(length), packed(length + 1);
    for (int64_t b = begin; b < end; ++b) {
      draw_words(philox, b, length, words);
      Cut masking = find_cut(words.data(), length, masked[b]);
      Cut dropping = find_cut(words.data(), length, dropped[b]);
      int32_t* const source = plan.source + b * (length + 1);
      // a sample's class token is its first row. Without branches: what is not kept, the next one overwrites
      rows[0] = static_cast<int32_t>(b * (length + 1));
      source[0] = static_cast<int32_t>(first_visible[b]);
      packed[0] = static_cast<int32_t>(first_row[b]);
      int64_t kept = 1, chosen = 0, seen = 1;
      for (int64_t token = 0; token < length; ++token) {
        const int32_t word = words[token];
        const bool is_masked = (word < masking.word) | ((word == masking.word) & (masking.ties > 0));
        const bool is_dropped = (word < dropping.word) | ((word == dropping.word) & (dropping.ties > 0));
        masking.ties -= word == masking.word;
        dropping.ties -= word == dropping.word;
        rows[kept] = static_cast<int32_t>(b * (length + 1) + 1 + token);
        kept += !is_dropped;
        index[chosen] = static_cast<int32_t>(b * length + token);
        chosen += is_masked;
        packed[seen] = static_cast<int32_t>(first_row[b] + kept - 1);
        source[1 + token] = is_masked ? -1 : static_cast<int32_t>(first_visible[b] + seen);
        seen += !is_masked;
        plan.is_masked[b * length + token] = is_masked;
      }
      copy_inside(rows, kept, first_row[b], plan.total_kept, plan.positions);
      copy_inside(index, chosen, first_masked[b], plan.total_masked, plan.masked_index);
      copy_inside(packed, seen, first_visible[b], plan.total_visible, plan.visible);
    }
  });
  for (int64_t row = first_row[batch]; row < plan.total_kept; ++row) plan.positions[row] = -1;
  for (int64_t i = first_masked[batch]; i < plan.total_masked; ++i) plan.masked_index[i] = -1;
  for (int64_t i = first_visible[batch]; i < plan.total_visible; ++i) plan.visible[i] = 0;
}

void mask_plan(
    const Tensor& state, const Tensor& num_masked, const Tensor& num_dropped, int64_t stream,
    const Tensor& positions, const Tensor& cu_seqlens, const Tensor& masked_index, const Tensor& source,
    const Tensor& is_masked, const Tensor& visible, const Tensor& visible_cu_seqlens) {
  const int64_t batch = is_masked.size(0), length = is_masked.size(1);
  const auto counts = [&](const Tensor& given) {
    const Integers numbers(given);
    std::vector<int64_t> counts(batch);
    for (int64_t b = 0; b < batch; ++b) counts[b] = std::clamp<int64_t>(numbers[b], 0, length);
    return counts;
  };
  const Plan plan{
      data<int32_t>(positions), data<int32_t>(cu_seqlens), data<int32_t>(masked_index), data<int32_t>(source),
      data<bool>(is_masked), data<int32_t>(visible), data<int32_t>(visible_cu_seqlens), positions.size(0),
      masked_index.size(0), visible.size(0)};
  plan_samples(philox_of(state, stream), counts(num_masked), counts(num_dropped), length, plan);
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def(
      "mask_plan(Tensor state, Tensor num_masked, Tensor num_dropped, int stream, Tensor(a!) positions, "
      "Tensor(b!) cu_seqlens, Tensor(c!) masked_index, Tensor(d!) source, Tensor(e!) is_masked, "
      "Tensor(f!) visible, Tensor(g!) visible_cu_seqlens) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) { m.impl("mask_plan", TORCH_BOX(&mage_fast::mask_plan)); }
