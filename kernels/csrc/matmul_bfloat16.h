// Products of bfloat16 matrices with sums in float, by the dot products of pairs that some processors have
// (AVX512-BF16). They take numbers below 1.2e-38 as zeros.
//
// Both factors are read as pairs along the depth of the product. A panel holds some columns of the right
// factor: pair p of column c is at panel[(p * kPanelColumns + c) * 2]; missing columns, and the partner of the
// last one where the depth is odd, are zeros.
#pragma once

#include <memory>

#include "simd.h"

#if defined(__AVX512F__)

namespace mage_fast {

constexpr int64_t kPanelColumns = 64;

// Whether the processor has the dot product; nothing below may be called where it has not.
bool has_bfloat16_dot();

// Uninitialised memory for so many numbers.
class PanelBuffer {
 public:
  explicit PanelBuffer(int64_t count) : vectors_(std::make_unique_for_overwrite<Floats[]>(count / (2 * kLanes) + 1)) {}
  BFloat16* data() const { return reinterpret_cast<BFloat16*>(vectors_.get()); }

 private:
  std::unique_ptr<Floats[]> vectors_;
};

inline int64_t pairs_of(int64_t depth) { return (depth + 1) / 2; }
inline int64_t panel_size(int64_t depth) { return pairs_of(depth) * 2 * kPanelColumns; }

// A panel of at most kPanelColumns columns of the right factor, whose rows are rows of a tensor.
template <class T>
void pack_rows(const T* from, int64_t stride, int64_t columns, int64_t depth, BFloat16* panel);

// The same where the columns are rows of a tensor.
template <class T>
void pack_columns(const T* from, int64_t stride, int64_t columns, int64_t depth, BFloat16* panel);

// A row of a left factor, rounded; a partner of the last element where their number is odd.
void round_row(const float* from, int64_t count, BFloat16* to);

// A left factor: element (row, 2 p) at data[row * row_stride + p * pair_stride], its partner behind it.
struct Pairs {
  const BFloat16* data;
  int64_t row_stride, pair_stride;
};

// c = a b + bias or, to add, c + a b + bias, for the columns of one panel; no bias: nullptr.
template <class T>
void multiply_panel(
    Pairs a, const BFloat16* panel, int64_t rows, int64_t columns, int64_t depth, const float* bias, bool add,
    T* c, int64_t c_stride);

}  // namespace mage_fast

#endif  // __AVX512F__
