// mage_fast_cpu::philox: the words of the counters (j, first_high + i, stream, step), i < high, j < low.
#include "philox.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

namespace {

using torch::stable::Tensor;

Tensor philox(const Tensor& state, int64_t stream, int64_t high, int64_t low, int64_t first_high) {
  mage_fast::check_rng_state(state, "philox");
  const int64_t* seed_step = reinterpret_cast<const int64_t*>(state.data_ptr());
  const uint32_t key0 = static_cast<uint32_t>(seed_step[0]);
  const uint32_t key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed_step[0]) >> 32);
  const uint32_t step = static_cast<uint32_t>(seed_step[1]);
  const uint32_t word2 = static_cast<uint32_t>(stream);

  Tensor words = torch::stable::new_empty(state, {high, low, 4}, torch::headeronly::ScalarType::Int);
  uint32_t* out = reinterpret_cast<uint32_t*>(words.data_ptr());
  torch::stable::parallel_for(0, high * low, 4096, [&](int64_t begin, int64_t end) {
    // Whole groups of 16 blocks of one row run with the words of a group side by side, which the
    // compiler turns into vector code; a row's remainder goes block by block.
    constexpr int64_t kGroup = 16;
    for (int64_t block = begin; block < end;) {
      const int64_t row = block / low, column = block - row * low;
      const int64_t run = std::min(end - block, low - column);
      int64_t done = 0;
      for (; done + kGroup <= run; done += kGroup) {
        uint32_t c0[kGroup], c1[kGroup], c2[kGroup], c3[kGroup];
        for (int64_t lane = 0; lane < kGroup; ++lane) {
          c0[lane] = static_cast<uint32_t>(column + done + lane);
          c1[lane] = static_cast<uint32_t>(first_high + row);
          c2[lane] = word2;
          c3[lane] = step;
        }
        uint32_t k0 = key0, k1 = key1;
        for (int round = 0; round < mage_fast::kPhiloxRounds; ++round) {
          for (int64_t lane = 0; lane < kGroup; ++lane) {
            const uint64_t p0 = static_cast<uint64_t>(c0[lane]) * mage_fast::kPhiloxMultiplier0;
            const uint64_t p1 = static_cast<uint64_t>(c2[lane]) * mage_fast::kPhiloxMultiplier1;
            c0[lane] = static_cast<uint32_t>(p1 >> 32) ^ c1[lane] ^ k0;
            c1[lane] = static_cast<uint32_t>(p1);
            c2[lane] = static_cast<uint32_t>(p0 >> 32) ^ c3[lane] ^ k1;
            c3[lane] = static_cast<uint32_t>(p0);
          }
          k0 += mage_fast::kPhiloxWeyl0;
          k1 += mage_fast::kPhiloxWeyl1;
        }
        uint32_t* group = out + (block + done) * 4;
        for (int64_t lane = 0; lane < kGroup; ++lane) {
          group[lane * 4 + 0] = c0[lane];
          group[lane * 4 + 1] = c1[lane];
          group[lane * 4 + 2] = c2[lane];
          group[lane * 4 + 3] = c3[lane];
        }
      }
      for (; done < run; ++done) {
        uint32_t counter[4] = {static_cast<uint32_t>(column + done), static_cast<uint32_t>(first_high + row), word2, step};
        mage_fast::philox_4x32(counter, key0, key1);
        std::copy(counter, counter + 4, out + (block + done) * 4);
      }
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
