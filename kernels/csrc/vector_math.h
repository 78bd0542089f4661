// exp, log and the normal distribution of kLanes floats, without branches and without tables.
#pragma once

#include <limits>

#include "simd.h"

namespace mage_fast {

// c[0] x^n + c[1] x^(n-1) + ... + c[n]
template <int kTerms>
inline Floats polynomial(Floats x, const float (&coefficients)[kTerms]) {
  Floats sum = all(coefficients[0]);
  for (int term = 1; term < kTerms; ++term) sum = sum * x + coefficients[term];
  return sum;
}

// 2^x of |x| <= 1/2
constexpr float kExp2[] = {1.535336188e-4f, 1.339887440e-3f, 9.618437357e-3f, 5.550332548e-2f,
                           2.402264791e-1f, 6.931472028e-1f, 1.0f};

// 2^x of x < 64, within 2 units in the last place; 0 below -126, NaN of NaN.
inline Floats exp2(Floats x) {
  const Floats magic = all(12583039.0f);  // 1.5 * 2^23 + 127: adding it leaves the exponent's bits at the end
  const Floats shifted = x + magic, part = x - (shifted - magic);
  const Floats fraction = polynomial(part, kExp2);
  return select(x < -126.0f, Floats{}, fraction * floats(bits(shifted) << 23));
}

// e^x of x < 88, within 2 units in the last place for |x| < 1, beyond that within 2 |x|: of a probability, less
// than a rounding of 1. 0 below -87.68, NaN of NaN.
inline Floats exp(Floats x) {
  // 1.5 * 2^23 rounds to an integer, 127 is the bias of exponents; at the lower limit the exponent is 0
  const Floats magic = all(12582912.0f + 127.0f), inside = max(all(-88.03f), x);
  const Floats shifted = inside * 1.44269504088896341f + magic;
  const Floats part = inside * 1.44269504088896341f - (shifted - magic);  // |part| <= 1/2
  const Floats fraction = polynomial(part, kExp2);
  return fraction * floats(bits(shifted) << 23);
}

// Natural logarithm, within 1 unit in the last place, of normal numbers and infinity; -infinity of 0 and of
// what is smaller than the normal numbers, NaN of negative ones and NaN.
inline Floats log(Floats x) {
  const Ints word = bits(x);
  // x = 2^exponent * m, m in [sqrt(1/2), sqrt(2))
  const Ints exponent = (word - 0x3F3504F3) >> 23;
  const Floats m = floats(word - (exponent << 23)) - 1.0f, square = m * m;
  Floats tail = polynomial(
      m, {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
          -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f});
  const Floats whole = __builtin_convertvector(exponent, Floats);
  tail = tail * m * square + whole * -2.12194440e-4f - 0.5f * square;
  const Floats result = (m + tail) + whole * 0.693359375f;
  const Floats infinity = all(std::numeric_limits<float>::infinity());
  const Floats special = select(x == infinity, x, select(x < 0.0f, x - x, -infinity));
  const Floats nan = all(std::numeric_limits<float>::quiet_NaN());
  const Ints is_normal = (x >= std::numeric_limits<float>::min()) & (x < infinity);
  return select(is_normal, result, select((x < 0.0f) | (x != x), nan, special));
}

// 1 / (1 + e^-x), within 6 units in the last place for |x| < 5, beyond that within |x|; 0 and 1 far out, NaN
// of NaN.
inline Floats sigmoid(Floats x) {
  const Floats power = x * -1.44269504088896341f;
#if defined(__AVX512DQ__)
  // scalef takes any exponent; of an infinite power the part is 0
  const auto part = reinterpret_cast<Floats>(
      _mm512_maskz_reduce_ps(0xFFFF, reinterpret_cast<__m512>(power), _MM_FROUND_NO_EXC));
  const Floats whole = power - part;
#else
  const Floats magic = all(12582912.0f), inside = max(all(-126.0f), min(all(128.0f), power));
  const Floats shifted = inside + magic, part = inside - (shifted - magic);
#endif
  const Floats fraction = polynomial(part, kExp2);
#if defined(__AVX512DQ__)
  const auto odds = reinterpret_cast<Floats>(_mm512_maskz_scalef_ps(
      0xFFFF, reinterpret_cast<__m512>(fraction), reinterpret_cast<__m512>(whole)));
#else
  const Floats scaled = floats(bits(fraction) + (bits(shifted) << 23));  // at 128 infinity
  const Floats odds = select(x == x, scaled, x);
#endif
  return 1.0f / (1.0f + odds);
}

// 1 - Phi(a) of a >= 0, Phi the normal distribution function, as 2^(a q(a) - 1); within 5e-8, a rounding of
// 1 - Phi(0). A weighted minimax fit on [0, 5.6], beyond which the tail falls to 0.
inline Floats normal_tail(Floats a) {
  const Floats q = polynomial(
      a, {-2.834910674209823e-06f, 3.937766086892225e-05f, -0.0001861800701590255f,
          -0.00013693679647985846f, 0.0070634204894304276f, -0.052496179938316345f, -0.4592081904411316f,
          -1.1511051654815674f});
  return exp2(q * a - 1.0f);
}

// |s|, no more than where the normal tail has underflowed: so infinity times its tail is 0. NaN stays.
inline Floats tail_argument(Floats s) {
  const Floats a = abs(s);
  return select(a > 16.0f, all(16.0f), a);
}

// s Phi(s)
inline Floats gelu(Floats s) {
  const Floats a = tail_argument(s);
  return select(s < 0.0f, Floats{}, s) - a * normal_tail(a);
}

// d gelu / d s = Phi(s) + s phi(s); of -s it is one less that of s
inline Floats gelu_slope(Floats s) {
  const Floats a = tail_argument(s);
  const Floats density = exp2(-0.7213475204444817f * a * a - 1.3257480647361595f);
  const Floats below = normal_tail(a) - a * density;
  return select(s > 0.0f, 1.0f - below, below);
}

}  // namespace mage_fast
