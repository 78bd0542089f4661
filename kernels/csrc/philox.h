// Philox-4x32-10 (Salmon et al., SC 2011). The counter layout is documented in kernels/rng.py.
#pragma once

#include <cstdint>

namespace mage_fast {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// kLanes blocks under one key: four counter words in, four random words out, in place. Word w of every
// lane lies side by side, so the compiler turns the inner loop into vector code.
template <int kLanes>
inline void philox_4x32(uint32_t (&words)[4][kLanes], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t product0 = static_cast<uint64_t>(words[0][lane]) * kPhiloxMultiplier0;
      const uint64_t product1 = static_cast<uint64_t>(words[2][lane]) * kPhiloxMultiplier1;
      words[0][lane] = static_cast<uint32_t>(product1 >> 32) ^ words[1][lane] ^ key0;
      words[1][lane] = static_cast<uint32_t>(product1);
      words[2][lane] = static_cast<uint32_t>(product0 >> 32) ^ words[3][lane] ^ key1;
      words[3][lane] = static_cast<uint32_t>(product0);
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

}  // namespace mage_fast
