// Products of float matrices that lie in the cache, rows of whole vectors. And how rows of tensors become
// such matrices, as they are or transposed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "simd.h"

namespace mage_fast {

// The tile: its sums, a row of the right factor and an element of the left one fill the registers.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;
constexpr int64_t kTileColumns = kTileVectors * kLanes;

// Sums are over so many products, then added up: what all tiles of some columns read of the right factor
// stays in the first-level cache, and shorter sums round off less.
constexpr int64_t kMostDepth = 80;

// A matrix of rows `stride` floats apart.
struct Matrix {
  float* data;
  int64_t stride;
  float* row(int64_t i) const { return data + i * stride; }
};

// n items in pieces of one size (the last one smaller), at most `most` each: as few as possible, as even as
// multiples of `unit` can be.
struct Pieces {
  Pieces(int64_t n, int64_t most, int64_t unit) : n(n) {
    const int64_t count = std::max<int64_t>((n + most - 1) / most, 1), even = (n + count - 1) / count;
    size = std::max(std::min((even + unit - 1) / unit * unit, most), int64_t{1});
  }
  int64_t length(int64_t first) const { return std::min(size, n - first); }
  int64_t n, size;
};

inline int64_t whole_vectors(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

// Stride of rows of so many columns. Where a tile takes but a part of the rows, they are an odd number of
// cache lines apart: at a power of two apart they would fight for the same places of the cache.
inline int64_t stride_of(int64_t columns) {
  const int64_t whole = whole_vectors(columns), line = 64 / sizeof(float);
  return whole <= kTileColumns ? whole : ((whole + line - 1) / line | 1) * line;
}

// Uninitialised memory from which matrices are taken; each starts at a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new float[floats + kLine]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = memory_.get() + (kLine - address / sizeof(float) % kLine) % kLine;
  }
  float* take(int64_t floats) { return std::exchange(next_, next_ + room(floats)); }
  Matrix take(int64_t rows, int64_t columns) { return {take(rows * stride_of(columns)), stride_of(columns)}; }
  static int64_t room(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }
  static int64_t room(int64_t rows, int64_t columns) { return room(rows * stride_of(columns)); }

 private:
  static constexpr int64_t kLine = 64 / sizeof(float);
  std::unique_ptr<float[]> memory_;
  float* next_;
};

// c = a b or, to add, c + a b; a transposed is given by its columns. `columns` are whole vectors in b and c.
// The sum of an element of c is one of sums over pieces of the depth, each in order, whatever the tile.
template <bool kTransposed>
void multiply(
    Matrix a, Matrix b, int64_t rows, int64_t columns, int64_t depth, bool add, Matrix c,
    int64_t most_depth = kMostDepth);

// Rows of a tensor, `stride` elements apart, as a matrix; zeros up to whole vectors.
template <class T>
void copy_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, Matrix to) {
  for (int64_t row = 0; row < rows; ++row) {
    for_vectors(columns, [&](int64_t first, auto count) {
      store(to.row(row) + first, load(from + row * stride + first, count));
    });
  }
}

// Lanes of a and b by turns: a0 b0 a1 b1 ..., in two vectors.
template <size_t... kLane>
inline void zip(Floats a, Floats b, Floats* to, std::index_sequence<kLane...>) {
  to[0] = __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kLanes)...);
  to[1] = __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kLanes + kLanes / 2)...);
}

// A zip of the upper half of the vectors with the lower one rotates the bits of (vector, lane) by one; so
// many of them as a lane has bits swap the two.
inline void transpose(Floats (&x)[kLanes]) {
  for (int size = 1; size < kLanes; size *= 2) {
    Floats next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      zip(x[i], x[i + kLanes / 2], next + 2 * i, std::make_index_sequence<kLanes>());
    }
    for (int i = 0; i < kLanes; ++i) x[i] = next[i];
  }
}

// The transposed matrix of the rows of a tensor: `columns` rows; zeros up to whole vectors.
template <class T>
void copy_transposed(const T* from, int64_t stride, int64_t rows, int64_t columns, Matrix to) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, rows - row);
    for_vectors(columns, [&](int64_t first, auto count) {
      Floats x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = i < some ? load(from + (row + i) * stride + first, count) : Floats{};
      }
      transpose(x);
      for (int i = 0; i < count; ++i) store(to.row(first + i) + row, x[i]);
    });
  }
}

}  // namespace mage_fast
