// The products of matmul_bfloat16.h: a tile of 6 rows and a panel's columns in registers.
#include "matmul_bfloat16.h"

#if defined(__AVX512F__)

#include <algorithm>
#include <utility>

#include "matmul.h"

// What is compiled for the dot product, though the library is not.
#define DOT __attribute__((target("avx512bf16")))

namespace mage_fast {

bool has_bfloat16_dot() { return __builtin_cpu_supports("avx512bf16"); }

namespace {

constexpr int kVectors = kPanelColumns / kLanes;

// The parts of a row that are in one page follow each other in the cache by themselves; rows do not.
constexpr int64_t kAheadRows = 16, kAheadElements = 128;

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1); }
inline __mmask32 first_halves(int64_t count) {
  return static_cast<__mmask32>((1ull << std::clamp<int64_t>(count, 0, 32)) - 1);
}

// 32 numbers in bfloat16, zeros from `count` on.
DOT inline __m512i load_halves(const float* from, int64_t count) {
  return (__m512i)_mm512_cvtne2ps_pbh(
      _mm512_maskz_loadu_ps(first_lanes(count - kLanes), from + kLanes),
      _mm512_maskz_loadu_ps(first_lanes(count), from));
}
DOT inline __m512i load_halves(const BFloat16* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(first_halves(count), from);
}

// 16 numbers of each of two rows: the first row in the lower half.
DOT inline __m512i load_rows(const float* first, const float* second, __mmask16 lanes) {
  const __mmask16 partner = second ? lanes : 0;
  return (__m512i)_mm512_cvtne2ps_pbh(
      _mm512_maskz_loadu_ps(partner, second), _mm512_maskz_loadu_ps(lanes, first));
}
DOT inline __m512i load_rows(const BFloat16* first, const BFloat16* second, __mmask16 lanes) {
  const __mmask16 partner = second ? lanes : 0;
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(lanes, first)),
      _mm256_maskz_loadu_epi16(partner, second), 1);
}

DOT inline void store_lanes(float* to, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, x); }
DOT inline void store_lanes(BFloat16* to, __m512 x, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}
DOT inline __m512 load_lanes(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
DOT inline __m512 load_lanes(const BFloat16* from, __mmask16 lanes) {
  return (__m512)_mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_maskz_loadu_epi16(lanes, from)), 16);
}

template <class T, int kRows>
DOT void multiply_tile(
    Pairs a, const BFloat16* panel, int64_t columns, int64_t pairs, const float* bias, bool add, T* c,
    int64_t c_stride) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int vector = 0; vector < kVectors; ++vector) {
    const __mmask16 lanes = first_lanes(columns - vector * kLanes);
    const __m512 start = bias ? load_lanes(bias + vector * kLanes, lanes) : _mm512_setzero_ps();
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) sums[row][vector] = start;
  }
  const BFloat16* left = a.data;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512bh right[kVectors];
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      right[vector] = (__m512bh)_mm512_loadu_si512(panel + vector * 2 * kLanes);
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      int32_t both;
      std::memcpy(&both, left + row * a.row_stride, sizeof(both));
      const __m512bh repeated = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector) {
        sums[row][vector] = _mm512_dpbf16_ps(sums[row][vector], repeated, right[vector]);
      }
    }
    left += a.pair_stride;
    panel += 2 * kPanelColumns;
  }
#pragma GCC unroll 4
  for (int vector = 0; vector < kVectors; ++vector) {
    const __mmask16 lanes = first_lanes(columns - vector * kLanes);
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      T* to = c + row * c_stride + vector * kLanes;
      const __m512 sum = add ? _mm512_add_ps(load_lanes(to, lanes), sums[row][vector]) : sums[row][vector];
      store_lanes(to, sum, lanes);
    }
  }
}

}  // namespace

template <class T>
DOT void pack_rows(const T* from, int64_t stride, int64_t columns, int64_t depth, BFloat16* panel) {
  alignas(64) uint16_t turns[2 * kLanes];  // an element of the first row, one of the second
  for (int i = 0; i < 2 * kLanes; ++i) turns[i] = i / 2 + i % 2 * kLanes;
  const __m512i by_turns = _mm512_load_si512(turns);
  for (int64_t row = 0; row < depth; row += 2) {
    const T* first = from + row * stride;
    const T* second = row + 1 < depth ? first + stride : nullptr;
    prefetch<false>(first + kAheadRows * stride, columns);
    prefetch<false>(first + (kAheadRows + 1) * stride, columns);
    for (int64_t column = 0; column < kPanelColumns; column += kLanes, panel += 2 * kLanes) {
      const __mmask16 lanes = first_lanes(columns - column);
      const __m512i both = load_rows(first + column, second ? second + column : nullptr, lanes);
      _mm512_storeu_si512(panel, _mm512_permutexvar_epi16(by_turns, both));
    }
  }
}

template <class T>
DOT void pack_columns(const T* from, int64_t stride, int64_t columns, int64_t depth, BFloat16* panel) {
  for (int64_t first = 0; first < depth; first += 2 * kLanes) {
    const int64_t pairs = std::min<int64_t>(kLanes, pairs_of(depth - first));
    for (int64_t column = 0; column < kPanelColumns; column += kLanes) {
      Floats x[kLanes];  // of a column, 16 pairs
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t count = column + i < columns ? depth - first : 0;
        prefetch<false>(from + (column + i) * stride + first + kAheadElements, 2 * kLanes);
        x[i] = (Floats)load_halves(from + (count ? (column + i) * stride + first : 0), count);
      }
      transpose(x);
      BFloat16* to = panel + (first * kPanelColumns + 2 * column);
      for (int pair = 0; pair < pairs; ++pair) _mm512_storeu_si512(to + pair * 2 * kPanelColumns, (__m512i)x[pair]);
    }
  }
}

DOT void round_row(const float* from, int64_t count, BFloat16* to) {
  for (int64_t first = 0; first < count; first += 2 * kLanes) {
    const int64_t rest = count - first;
    const __m512i x = load_halves(from + first, rest);
    _mm512_mask_storeu_epi16(to + first, first_halves(rest + rest % 2), x);
  }
}

template <class T>
DOT void multiply_panel(
    Pairs a, const BFloat16* panel, int64_t rows, int64_t columns, int64_t depth, const float* bias, bool add,
    T* c, int64_t c_stride) {
  const auto tiles = [&]<int kRows>(std::integral_constant<int, kRows>, int64_t row) {
    multiply_tile<T, kRows>(
        {a.data + row * a.row_stride, a.row_stride, a.pair_stride}, panel, columns, pairs_of(depth), bias, add,
        c + row * c_stride, c_stride);
  };
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) tiles(std::integral_constant<int, kTileRows>(), row);
  switch (rows - row) {
    case 5: return tiles(std::integral_constant<int, 5>(), row);
    case 4: return tiles(std::integral_constant<int, 4>(), row);
    case 3: return tiles(std::integral_constant<int, 3>(), row);
    case 2: return tiles(std::integral_constant<int, 2>(), row);
    case 1: return tiles(std::integral_constant<int, 1>(), row);
  }
}

template void pack_rows(const float*, int64_t, int64_t, int64_t, BFloat16*);
template void pack_rows(const BFloat16*, int64_t, int64_t, int64_t, BFloat16*);
template void pack_columns(const float*, int64_t, int64_t, int64_t, BFloat16*);
template void pack_columns(const BFloat16*, int64_t, int64_t, int64_t, BFloat16*);
template void multiply_panel(
    Pairs, const BFloat16*, int64_t, int64_t, int64_t, const float*, bool, float*, int64_t);
template void multiply_panel(
    Pairs, const BFloat16*, int64_t, int64_t, int64_t, const float*, bool, BFloat16*, int64_t);

}  // namespace mage_fast

#endif  // __AVX512F__
