// mage_fast_cpu::philox: the words of the counters (j, first_high + i, stream, step), i < high, j < low.
#include "philox.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

namespace {

using torch::stable::Tensor;

// What every block of one call shares.
struct Call {
  uint32_t key0, key1, stream, step;
};

// Writes the blocks (column .. column + kLanes - 1, row) to out, four words a block.
template <int kLanes>
void write_blocks(const Call& call, int64_t row, int64_t column, uint32_t* out) {
  uint32_t words[4][kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    words[0][lane] = static_cast<uint32_t>(column + lane);
    words[1][lane] = static_cast<uint32_t>(row);
    words[2][lane] = call.stream;
    words[3][lane] = call.step;
  }
  mage_fast::philox_4x32(words, call.key0, call.key1);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int word = 0; word < 4; ++word) out[lane * 4 + word] = words[word][lane];
  }
}

Tensor philox(const Tensor& state, int64_t stream, int64_t high, int64_t low, int64_t first_high) {
  mage_fast::check_rng_state(state, "philox");
  const int64_t* seed_step = reinterpret_cast<const int64_t*>(state.data_ptr());
  const Call call{
      static_cast<uint32_t>(seed_step[0]),
      static_cast<uint32_t>(static_cast<uint64_t>(seed_step[0]) >> 32),
      static_cast<uint32_t>(stream),
      static_cast<uint32_t>(seed_step[1]),
  };

  Tensor words = torch::stable::new_empty(state, {high, low, 4}, torch::headeronly::ScalarType::Int);
  uint32_t* out = reinterpret_cast<uint32_t*>(words.data_ptr());
  torch::stable::parallel_for(0, high * low, 4096, [&](int64_t begin, int64_t end) {
    constexpr int kLanes = 16;
    for (int64_t block = begin; block < end;) {
      const int64_t row = block / low, column = block % low;
      const int64_t run = std::min(end - block, low - column);  // blocks left in this row
      int64_t done = 0;
      for (; done + kLanes <= run; done += kLanes) {
        write_blocks<kLanes>(call, first_high + row, column + done, out + (block + done) * 4);
      }
      for (; done < run; ++done) write_blocks<1>(call, first_high + row, column + done, out + (block + done) * 4);
      block += run;
    }
  });
  return words;
}

}  // namespace

STABLE_TORCH_LIBRARY(mage_fast_cpu, m) {
  m.def("philox(Tensor state, SymInt stream, SymInt high, SymInt low, SymInt first_high) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("philox", TORCH_BOX(&philox));
}
