// What attention's forward and backward share: how a packed batch is split into tasks, dropout of
// probabilities, the last vector of a row of scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "matmul.h"
#include "philox.h"
#include "tensors.h"

namespace mage_fast {

typedef int8_t Octets __attribute__((vector_size(kLanes)));

constexpr float kLog2E = 1.44269504088896341f;
constexpr int64_t kKeysOfBlock = 16;  // 8 bits each in a Philox block of 128

// Scores of so many keys are in the cache at a time.
constexpr int64_t kMostKeys = 512;

// Queries first .. first + queries - 1 of a head of the sequence that has the packed rows from start on.
struct Task {
  int64_t start, length, head, first, queries;
  int64_t work_before;  // of all earlier tasks: pairs of a query and a key
};

// Every head of every sequence, in pieces of at most `most` queries. Heads are the inner loop: one after the
// other they read the same pages of memory.
inline std::vector<Task> tasks_of(const Tensor& cu_seqlens, int64_t total, int64_t heads, int64_t most) {
  const int32_t* ends = data<int32_t>(cu_seqlens);
  const int64_t sequences = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(
      sequences >= 0 && ends[0] == 0 && ends[sequences] == total &&
          std::is_sorted(ends, ends + sequences + 1),
      "mage_fast_cpu: attention's cu_seqlens do not rise from 0 to the ", total, " rows of qkv");
  std::vector<Task> tasks;
  int64_t work = 0;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t start = ends[sequence], length = ends[sequence + 1] - start;
    const Pieces pieces(length, most, kTileRows);
    for (int64_t first = 0; first < length; first += pieces.size) {
      for (int64_t head = 0; head < heads; ++head) {
        tasks.push_back({start, length, head, first, pieces.length(first), work});
        work += length * pieces.length(first);
      }
    }
  }
  return tasks;
}

// f(begin, end) on all threads, runs of tasks with equal shares of the work.
template <class F>
void for_tasks(const std::vector<Task>& tasks, const F& f) {
  constexpr int64_t kShares = 240;
  if (tasks.empty()) return;
  const int64_t work = tasks.back().work_before + tasks.back().length * tasks.back().queries;
  const auto first_of = [&](int64_t share) {
    const auto starts_before = [](const Task& task, double border) { return task.work_before < border; };
    const double border = static_cast<double>(work) * share / kShares;
    return std::lower_bound(tasks.begin(), tasks.end(), border, starts_before) - tasks.begin();
  };
  torch::stable::parallel_for(0, kShares, 1, [&](int64_t begin, int64_t end) {
    if (first_of(begin) < first_of(end)) f(first_of(begin), first_of(end));
  });
}

inline int64_t longest(const std::vector<Task>& tasks) {
  int64_t length = 0;
  for (const Task& task : tasks) length = std::max(length, task.length);
  return length;
}

// Heads, their features and the elements of one tensor, q, k and v side by side.
struct Heads {
  int64_t count, features;
  int64_t qkv_stride() const { return 3 * count * features; }
  int64_t out_stride() const { return count * features; }
  // of a head's query (which = 0), key (1), value (2)
  int64_t qkv_offset(int64_t row, int64_t which, int64_t head) const {
    return ((row * 3 + which) * count + head) * features;
  }
  int64_t out_offset(int64_t row, int64_t head) const { return (row * count + head) * features; }
};

// Dropout of probabilities: 8 bits each.
struct ProbabilityDropout {
  bool drops = false;
  float scale = 1.0f;
  int32_t least_kept = 0;
  Philox philox;

  // Bytes of a row. Key k, counted from a multiple of 16 on, has byte k + 15.
  static int64_t row_bytes(int64_t keys) {
    return (keys + 2 * (kKeysOfBlock - 1)) / kKeysOfBlock * kKeysOfBlock;
  }
  // Of rows, with what is written and read past their end.
  static int64_t room(int64_t rows, int64_t keys) { return rows * row_bytes(keys) + kBlocks * kKeysOfBlock; }

  // Draws the bytes of `rows` rows, whose numbers are first_row, first_row + step, ...; the Philox blocks of
  // all of them are one run, so no lane is idle.
  void draw_rows(
      uint64_t first_row, uint64_t step, int64_t rows, int64_t first_key, int64_t keys, int8_t* to) const {
    const uint64_t blocks = row_bytes(keys) / kKeysOfBlock, first_block = first_key / kKeysOfBlock;
    const Longs lanes = counting_from(0);
    Longs row = lanes / blocks, block = lanes - row * blocks;
    row = row * step + first_row;
    const uint64_t rows_on = kBlocks / blocks, blocks_on = kBlocks % blocks;
    for (uint64_t done = 0; done < rows * blocks; done += kBlocks) {
      store(to + done * kKeysOfBlock, draw(philox, block + first_block, row));
      block += blocks_on;
      const Longs is_past = reinterpret_cast<Longs>(block >= blocks);
      block -= is_past & blocks;
      row += (is_past & step) + rows_on * step;
    }
  }

  Ints kept(const int8_t* bytes) const {
    const Shorts drawn = __builtin_convertvector(load_as<Octets>(bytes), Shorts);
    return __builtin_convertvector(drawn, Ints) >= least_kept;
  }
};

inline ProbabilityDropout probability_dropout_of(
    const std::optional<Tensor>& state, int64_t stream, int64_t least_kept, double scale) {
  if (!state.has_value()) return {};
  return {true, static_cast<float>(scale), static_cast<int32_t>(least_kept), philox_of(*state, stream)};
}

// x in the first `count` lanes, which a whole vector (count known to the compiler) has all; else `fill`.
template <class Count>
inline Floats first_lanes(Floats x, Count count, float fill) {
  if constexpr (!std::is_same_v<Count, int64_t>) return x;
  return select(lane_numbers() < static_cast<int32_t>(count), x, all(fill));
}

// f(std::true_type) or f(std::false_type)
template <class F>
void for_bool(bool value, const F& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace mage_fast
