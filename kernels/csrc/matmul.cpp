// The products of matmul.h: a tile of the product in registers.
#include "matmul.h"

#include <array>

namespace mage_fast {
namespace {

// f(0), f(1), ... f(kCount - 1), the numbers known to the compiler: so what they index can be in registers.
template <int kCount, class F>
inline __attribute__((always_inline)) void unrolled(const F& f) {
  [&]<int... kNumber>(std::integer_sequence<int, kNumber...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, kNumber>{}), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// c = a b or, to add, c + a b, in kRows x kVectors registers. Of a transposed left factor a holds the
// columns as rows.
template <bool kTransposed, int kRows, int kVectors>
void multiply_tile(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, bool add, float* c,
    int64_t c_stride) {
  Floats sums[kRows][kVectors], right[kVectors];
  unrolled<kRows>([&](auto row) { unrolled<kVectors>([&](auto vector) { sums[row][vector] = Floats{}; }); });
  for (int64_t i = 0; i < depth; ++i) {
    unrolled<kVectors>([&](auto vector) { right[vector] = load(b + vector * kLanes); });
    unrolled<kRows>([&](auto row) {
      const float left = kTransposed ? a[row] : a[row * a_stride];
      unrolled<kVectors>([&](auto vector) { sums[row][vector] += left * right[vector]; });
    });
    a += kTransposed ? a_stride : 1;
    b += b_stride;
  }
  unrolled<kRows>([&](auto row) {
    unrolled<kVectors>([&](auto vector) {
      float* to = c + row * c_stride + vector * kLanes;
      store(to, add ? load(to) + sums[row][vector] : sums[row][vector]);
    });
  });
}

using MultiplyTile = void (*)(
    const float*, int64_t, const float*, int64_t, int64_t depth, bool add, float*, int64_t);

// The tiles of every size: [(rows - 1) * kTileVectors + vectors - 1]
template <bool kTransposed, size_t... kIndex>
constexpr std::array<MultiplyTile, sizeof...(kIndex)> tiles_of_all_sizes(std::index_sequence<kIndex...>) {
  return {multiply_tile<kTransposed, kIndex / kTileVectors + 1, kIndex % kTileVectors + 1>...};
}

}  // namespace

template <bool kTransposed>
void multiply(
    Matrix a, Matrix b, int64_t rows, int64_t columns, int64_t depth, bool add, Matrix c, int64_t most_depth) {
  static constexpr auto kTiles =
      tiles_of_all_sizes<kTransposed>(std::make_index_sequence<kTileRows * kTileVectors>());
  const Pieces pieces(depth, most_depth, 1);
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    const int64_t vectors = std::min(kTileColumns, columns - column) / kLanes;
    for (int64_t first = 0; first < depth; first += pieces.size) {
      const float* left = kTransposed ? a.row(first) : a.data + first;
      for (int64_t row = 0; row < rows; row += kTileRows) {
        const int64_t tile_rows = std::min<int64_t>(kTileRows, rows - row);
        kTiles[(tile_rows - 1) * kTileVectors + vectors - 1](
            left + (kTransposed ? row : row * a.stride), a.stride, b.row(first) + column, b.stride,
            pieces.length(first), add || first > 0, c.row(row) + column, c.stride);
      }
    }
  }
}

template void multiply<false>(Matrix, Matrix, int64_t, int64_t, int64_t, bool, Matrix, int64_t);
template void multiply<true>(Matrix, Matrix, int64_t, int64_t, int64_t, bool, Matrix, int64_t);

}  // namespace mage_fast
