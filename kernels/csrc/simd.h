// Vectors of kLanes floats. The compiler's vector extensions give every operator, on any processor; each
// library is compiled for one instruction set (CMakeLists.txt), which decides how wide a vector is.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mage_fast {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif
constexpr int kLanes = kVectorBytes / 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;  // of vectors
#else
constexpr int kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Longs __attribute__((vector_size(kVectorBytes)));  // kLanes / 2 of them
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef int16_t Shorts __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};

// The same value in every lane.
inline Floats all(float x) { return Floats{} + x; }
inline Ints all(int32_t x) { return Ints{} + x; }

// 0, 1, 2, ... kLanes - 1
inline Ints lane_numbers() {
  Ints lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// A comparison gives Ints of -1 (true) and 0; with it: select(a < b, a, b).
inline Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
inline Ints select(Ints condition, Ints yes, Ints no) { return condition ? yes : no; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }  // b where either is NaN
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }

inline Ints bits(Floats x) { return reinterpret_cast<Ints>(x); }
inline Floats floats(Ints x) { return reinterpret_cast<Floats>(x); }
inline Floats abs(Floats x) { return floats(bits(x) & 0x7FFFFFFF); }

// x, rounded before a sum takes it up: it does not fuse with the product that it may be.
inline Floats rounded(Floats x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// Whole vectors, aligned or not.
template <class Vector, class T>
inline Vector load_as(const T* from) {
  Vector x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline Floats load(const float* from) { return load_as<Floats>(from); }
// Numbers of 16 bits to 32 and back, their low halves.
inline Words widen(Halves x) {
#if defined(__AVX512F__)  // GCC 12 does it in two pieces; maskz as in multiply_low
  return reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xFFFF, reinterpret_cast<__m256i>(x)));
#else
  return __builtin_convertvector(x, Words);
#endif
}
inline Halves narrow(Words x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Halves>(_mm512_maskz_cvtepi32_epi16(0xFFFF, reinterpret_cast<__m512i>(x)));
#else
  return __builtin_convertvector(x, Halves);
#endif
}

inline Floats load(const BFloat16* from) {
  return reinterpret_cast<Floats>(widen(load_as<Halves>(from)) << 16);
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }
inline void store(BFloat16* to, Floats x) {  // to nearest, ties to even; NaN stays NaN
  const Words word = reinterpret_cast<Words>(x);
  const Words rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
  const Halves halves = narrow(x == x ? rounded : (Words{} + 0x7FC0));
  std::memcpy(to, &halves, sizeof(halves));
}

// The first `count` elements only; the other lanes read `fill`.
template <class T>
inline Floats load(const T* from, int64_t count, float fill = 0.0f) {
  if (count == kLanes) return load(from);
  T whole[kLanes] = {};
  std::memcpy(whole, from, count * sizeof(T));
  return select(lane_numbers() < static_cast<int32_t>(count), load(whole), all(fill));
}

template <class T>
inline void store(T* to, Floats x, int64_t count) {
  if (count == kLanes) return store(to, x);
  T whole[kLanes];
  store(whole, x);
  std::memcpy(to, whole, count * sizeof(T));
}

// f(first, kLanes) for every whole vector of `size` elements, then f(first, rest). Inlined, the first call
// sees a constant count, so its loads and stores are whole vectors.
template <class F>
inline __attribute__((always_inline)) void for_vectors(int64_t size, const F& f) {
  int64_t first = 0;
  for (; first + kLanes <= size; first += kLanes) f(first, std::integral_constant<int64_t, kLanes>{});
  if (first < size) f(first, size - first);
}

// The sum of f(first, count) over the vectors: four sums, so that no addition waits for the one before it.
template <class F>
inline __attribute__((always_inline)) Floats sum_vectors(int64_t size, const F& f) {
  Floats sums[4] = {};
  int64_t first = 0;
  for (; first + 4 * kLanes <= size; first += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) sums[i] += f(first + i * kLanes, std::integral_constant<int64_t, kLanes>{});
  }
  for_vectors(size - first, [&](int64_t rest, auto count) { sums[0] += f(first + rest, count); });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Lane i reads lane i + kBy, the last ones the first ones again.
template <int kBy, int... kLane>
inline Floats rotate(Floats x, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, ((kLane + kBy) % kLanes)...);
}

// All lanes joined by `f`, in halves: the same order always.
template <int kHalf = kLanes / 2, class F>
inline float reduce(Floats x, const F& f) {
  x = f(x, rotate<kHalf>(x, std::make_integer_sequence<int, kLanes>()));
  if constexpr (kHalf > 1) return reduce<kHalf / 2>(x, f);
  return x[0];
}

inline float sum(Floats x) {
  return reduce(x, [](Floats a, Floats b) { return a + b; });
}

inline int64_t sum(Ints x) {
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
  return total;
}

inline float max(Floats x) {  // NaN in a lane may be lost
  return reduce(x, [](Floats a, Floats b) { return max(a, b); });
}

// Whether a comparison is true in some lane.
inline bool any(Ints condition) {
#if defined(__AVX512F__)
  const __m512i lanes = reinterpret_cast<__m512i>(condition);
  return _mm512_test_epi32_mask(lanes, lanes) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(condition)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(condition)) != 0;
#else
  const Longs pairs = reinterpret_cast<Longs>(condition);
  uint64_t joined = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) joined |= pairs[lane];
  return joined != 0;
#endif
}

// 64-bit products of the low 32 bits of every 64-bit lane.
inline Longs multiply_low(Longs a, Longs b) {
#if defined(__AVX512F__)
  // maskz: GCC 12 warns of its own unmasked one (bug 105593)
  return reinterpret_cast<Longs>(
      _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Longs>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<Longs>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Asks for elements of a row, to be read or to be written, before they are wanted: the processor does not foresee
// rows that are far apart. Reading ahead, there need be no such row.
template <bool kToWrite, class T>
inline __attribute__((always_inline)) void prefetch(const T* row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(row + i, kToWrite, 2);
}

}  // namespace mage_fast
