// The headers of the C++ kernels against the C library in double precision and Philox's known answers, in the
// instruction set that this is compiled for. Prints the largest errors; exit status 1 where one is too large.
#include <cmath>
#include <cstdio>
#include <limits>

#include "../../kernels/csrc/philox.h"
#include "../../kernels/csrc/vector_math.h"

using namespace mage_fast;

namespace {

int failures = 0;

void expect(bool right, const char* what) {
  if (!right) ++failures, std::printf("wrong: %s\n", what);
}

bool same(float a, float b) { return a == b || (a != a && b != b); }

// The largest distance from the double-precision function over [low, high], in units in the last place of the
// result, or absolutely.
template <class F, class G>
void compare(const char* name, F function, G exact, float low, float high, bool relative, double allowed) {
  double worst = 0;
  constexpr int kSteps = 400000;
  for (int step = 0; step < kSteps; step += kLanes) {
    Floats x;
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = low + (high - low) * (step + lane) / kSteps;
    const Floats got = function(x);
    for (int lane = 0; lane < kLanes; ++lane) {
      const double wanted = exact(static_cast<double>(x[lane]));
      const double unit = std::nextafter(std::fabs(static_cast<float>(wanted)), INFINITY) -
                          static_cast<double>(std::fabs(static_cast<float>(wanted)));
      worst = std::fmax(worst, std::fabs(got[lane] - wanted) / (relative ? unit : 1.0));
    }
  }
  std::printf("%s: %.3g %s\n", name, worst, relative ? "units in the last place" : "off");
  expect(worst <= allowed, name);
}

template <class F>
void value(const char* name, F function, float x, float wanted) {
  expect(same(function(all(x))[kLanes - 1], wanted), name);
}

double normal_distribution(double s) { return 0.5 * std::erfc(-s * std::sqrt(0.5)); }

void math() {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const auto exp_ = [](Floats x) { return exp(x); };
  const auto exp2_ = [](Floats x) { return exp2(x); };
  const auto log_ = [](Floats x) { return log(x); };
  const auto gelu_ = [](Floats x) { return gelu(x); };
  const auto exact_exp = [](double x) { return std::exp(x); };
  compare("exp near 0", exp_, exact_exp, -1.0f, 1.0f, true, 2);
  compare("exp of a few", exp_, exact_exp, -8.0f, 16.0f, true, 16);
  compare("exp far out", exp_, exact_exp, -87.0f, 87.9f, true, 174);
  compare("exp of what is negative", exp_, exact_exp, -87.0f, 0.0f, false, 1.2e-7);
  compare("exp2", exp2_, [](double x) { return std::exp2(x); }, -125.5f, 63.5f, true, 2);
  compare("log", log_, [](double x) { return std::log(x); }, 1e-30f, 1e-5f, true, 1);
  compare("log", log_, [](double x) { return std::log(x); }, 0.4f, 3.0f, true, 1);
  compare("log", log_, [](double x) { return std::log(x); }, 3.0f, 1e6f, true, 1);
  compare("gelu", gelu_, [](double s) { return s * normal_distribution(s); }, -8.0f, 8.0f, false, 5e-7);
  compare(
      "gelu_slope", [](Floats s) { return gelu_slope(s); },
      [](double s) {
        return normal_distribution(s) + s * std::exp(-s * s / 2) / std::sqrt(2 * std::acos(-1.0));
      },
      -8.0f, 8.0f, false, 3e-7);
  const auto sigmoid_ = [](Floats x) { return sigmoid(x); };
  const auto exact_sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  compare("sigmoid", sigmoid_, exact_sigmoid, -5.0f, 5.0f, true, 6);
  compare("sigmoid far out", sigmoid_, exact_sigmoid, -80.0f, 80.0f, true, 80);
  for (const uint32_t payload : {0x7FC00001u, 0x7FFFFFFFu, 0xFFC12345u, 0xFFFFFFFFu}) {
    float x;
    std::memcpy(&x, &payload, sizeof(x));
    value("exp of a NaN", exp_, x, nan);
    value("exp2 of a NaN", exp2_, x, nan);
    value("log of a NaN", log_, x, nan);
    value("gelu of a NaN", gelu_, x, nan);
    value("sigmoid of a NaN", sigmoid_, x, nan);
  }
  value("sigmoid of -inf", sigmoid_, -infinity, 0.0f);
  value("sigmoid of inf", sigmoid_, infinity, 1.0f);
  value("exp of 0", exp_, 0.0f, 1.0f);
  value("exp of NaN", exp_, nan, nan);
  value("exp2 of -inf", exp2_, -infinity, 0.0f);
  value("exp2 of NaN", exp2_, nan, nan);
  value("log of 0", log_, 0.0f, -infinity);
  value("log of 1", log_, 1.0f, 0.0f);
  value("log of inf", log_, infinity, infinity);
  value("log of -1", log_, -1.0f, nan);
  value("log of NaN", log_, nan, nan);
  value("gelu of inf", gelu_, infinity, infinity);
  value("gelu of -inf", gelu_, -infinity, 0.0f);
  value("gelu of NaN", gelu_, nan, nan);
}

void bfloat16() {
  // the second and third lie between two neighbours, whose even one is right
  const float cases[][2] = {{-1.004f, -1.0078125f}, {1.00390625f, 1.0f}, {1.01171875f, 1.015625f}, {3e38f, 226 * 0x1p120f}};
  for (const auto& [x, wanted] : cases) {
    BFloat16 rounded[kLanes];
    store(rounded, all(x));
    expect(load(rounded)[0] == wanted, "bfloat16");
  }
  BFloat16 rounded[kLanes];
  store(rounded, all(std::nanf("")));
  expect(std::isnan(load(rounded)[0]), "bfloat16 of NaN");
}

// Random123's known answers.
void philox() {
  struct Case {
    uint64_t seed;
    uint32_t block, row, stream, step, words[4];
  };
  const Case cases[] = {
      {0, 0, 0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {~uint64_t{0}, ~0u, ~0u, ~0u, ~0u, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x299f31d0a4093822, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Case& c : cases) {
    uint32_t words[kBlocks][4];
    store(words, draw({c.seed, c.stream, c.step}, counting_from(c.block), Longs{} + c.row));
    for (int word = 0; word < 4; ++word) expect(words[0][word] == c.words[word], "philox");
  }
}

void partial_vectors() {
  float from[kLanes], to[kLanes + 1];
  for (int count = 0; count < kLanes; ++count) {
    for (int lane = 0; lane < kLanes; ++lane) from[lane] = lane + 1.0f;
    for (float& x : to) x = -1.0f;
    const Floats x = load(from, count, 9.0f);
    store(to, x, count);
    for (int lane = 0; lane < kLanes; ++lane) {
      expect(x[lane] == (lane < count ? lane + 1.0f : 9.0f), "load of a part");
      expect(to[lane] == (lane < count ? lane + 1.0f : -1.0f), "store of a part");
    }
  }
  expect(sum(load(from)) == kLanes * (kLanes + 1) / 2, "sum");
  expect(max(load(from)) == kLanes, "max");
}

}  // namespace

int main() {
  math();
  bfloat16();
  philox();
  partial_vectors();
  std::printf("%d lanes, %d wrong\n", kLanes, failures);
  return failures != 0;
}
