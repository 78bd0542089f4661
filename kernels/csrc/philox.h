// Philox-4x32-10 (Salmon et al., SC 2011), and the dropout drawn with it. kernels/rng.py has the contract:
// which bits every random decision reads.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "simd.h"

namespace mage_fast {

// What all blocks of one call share: counter = (block, row, stream, step).
struct Philox {
  uint64_t seed = 0;
  uint32_t stream = 0, step = 0;
};

// Blocks drawn at a time: one in every 64-bit lane.
constexpr int kBlocks = kLanes / 2;

// Blocks of 128 random bits: words 0 (low) and 1 (high) of each in `first`, words 2 and 3 in `second`.
struct Blocks {
  Longs first, second;
};

// The blocks (block[i], row[i]). Products read the low half of a lane, so what stands in the high halves
// meanwhile does not matter.
inline Blocks draw(const Philox& philox, Longs block, Longs row) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t key0 = static_cast<uint32_t>(philox.seed), key1 = static_cast<uint32_t>(philox.seed >> 32);
  Longs word0 = block, word1 = row, word2 = Longs{} + philox.stream, word3 = Longs{} + philox.step;
  for (int round = 0; round < 10; ++round) {
    const Longs product0 = multiply_low(word0, Longs{} + kMultiplier0);
    const Longs product1 = multiply_low(word2, Longs{} + kMultiplier1);
    word0 = (product1 >> 32) ^ word1 ^ static_cast<uint64_t>(key0);
    word1 = product1;
    word2 = (product0 >> 32) ^ word3 ^ static_cast<uint64_t>(key1);
    word3 = product0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  return {(word0 & kLow) | (word1 << 32), (word2 & kLow) | (word3 << 32)};
}

// first, first + 1, ... one in every 64-bit lane
inline Longs counting_from(uint64_t first) {
  Longs numbers;
  for (int lane = 0; lane < kBlocks; ++lane) numbers[lane] = lane;
  return numbers + first;
}

// Writes all kBlocks blocks, 16 bytes each, words in memory order: the lanes of first and second by turns.
template <size_t... kLane>
inline void store_by_turns(void* to, Blocks blocks, std::index_sequence<kLane...>) {
  constexpr int kHalf = kBlocks / 2;
  const Longs low =
      __builtin_shufflevector(blocks.first, blocks.second, (kLane / 2 + kLane % 2 * kBlocks)...);
  const Longs high =
      __builtin_shufflevector(blocks.first, blocks.second, (kLane / 2 + kLane % 2 * kBlocks + kHalf)...);
  std::memcpy(to, &low, sizeof(low));
  std::memcpy(static_cast<char*>(to) + sizeof(low), &high, sizeof(high));
}

inline void store(void* to, Blocks blocks) {
  store_by_turns(to, blocks, std::make_index_sequence<kBlocks>());
}

// Writes the blocks first .. first + count - 1 of one row; `to` has room for a multiple of kBlocks.
inline void fill_blocks(const Philox& philox, uint64_t row, uint64_t first, int64_t count, void* to) {
  char* out = static_cast<char*>(to);
  for (int64_t done = 0; done < count; done += kBlocks) {
    store(out + done * 16, draw(philox, counting_from(first + done), Longs{} + row));
  }
}

// Dropout of activations: 16 bits an element of the flattened tensor.
class Dropout {
 public:
  Dropout() = default;  // keeps everything
  Dropout(Philox philox, int64_t least_kept, double scale)
      : philox_(philox), least_kept_(static_cast<int32_t>(least_kept)), scale_(static_cast<float>(scale)) {}

  bool drops() const { return scale_ != 1.0f; }

  // Bits of the elements first .. first + count - 1, to be given to apply(); they live in `buffer`. Null where
  // nothing is dropped.
  const int16_t* bits(int64_t first, int64_t count, std::vector<int16_t>& buffer) const {
    if (!drops()) return nullptr;
    const int64_t before = first % 8, blocks = (before + count + 7) / 8;
    const size_t room = (blocks + kBlocks) * 8 + kLanes;
    if (buffer.size() < room) buffer.resize(room);
    uint64_t block = first / 8;
    // the high word of a 64-bit block number is the row; a run that crosses 2^32 blocks is in two parts
    const uint64_t in_row = std::min<uint64_t>(blocks, (uint64_t{1} << 32) - (block & 0xFFFFFFFFu));
    fill_blocks(philox_, block >> 32, block & 0xFFFFFFFFu, in_row, buffer.data());
    if (in_row < static_cast<uint64_t>(blocks)) {
      fill_blocks(philox_, (block >> 32) + 1, 0, blocks - in_row, buffer.data() + in_row * 8);
    }
    return buffer.data() + before;
  }

  // x scaled where kept, else 0. x's elements are those of bits[first], bits[first + 1], ...; reads kLanes.
  Floats apply(Floats x, const int16_t* bits, int64_t first) const {
    if (bits == nullptr) return x;
    const Ints drawn = __builtin_convertvector(load_as<Shorts>(bits + first), Ints);
    return select(drawn >= least_kept_, x * scale_, Floats{});
  }

 private:
  Philox philox_;
  int32_t least_kept_ = 0;
  float scale_ = 1.0f;
};

}  // namespace mage_fast
