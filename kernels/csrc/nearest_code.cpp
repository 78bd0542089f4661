// nearest_code: the k that makes |c_k|^2 - 2 x.c_k least, of equal ones the lowest. A matrix product whose
// sums never leave the registers: a tile of kRows features by kCodes entries is summed over all channels,
// made distances and compared with the least so far of every row and lane. Features and codebook are copied
// before into the order in which the tiles read them. The rows are split into blocks; a block meets one panel
// of entries after another.
#include <limits>

#include "tensors.h"

namespace mage_fast {
namespace {

// The tile: kRows x kVectors sums, kVectors of codes and a feature fill the registers.
constexpr int kVectors = 2;
constexpr int kRows = kRegisters == 32 ? 12 : 6;
constexpr int kCodes = kVectors * kLanes;

// to[channel][i] = rows[first + i][channel] for i < kSize. Where there are no more rows the last one comes
// again: as a code it is as far as the last one and has a higher index, so it is never the nearest.
template <int kSize, class T>
void interleave(const T* rows, int64_t first, int64_t count, int64_t channels, float* to) {
  constexpr int64_t kPart = 2 * kLanes;  // of the channels, so that what is written to stays in the cache
  for (int64_t begin = 0; begin < channels; begin += kPart) {
    const int64_t size = std::min(kPart, channels - begin);
    for (int i = 0; i < kSize; ++i) {
      float part[kPart];
      const T* row = rows + std::min(first + i, count - 1) * channels + begin;
      for_vectors(size, [&](int64_t at, auto some) { store(part + at, load(row + at, some), some); });
      for (int64_t channel = 0; channel < size; ++channel) to[(begin + channel) * kSize + i] = part[channel];
    }
  }
}

// The least distances of a tile's rows so far, lane by lane, and the lowest entries that have them.
struct Nearest {
  Floats distance[kRows];
  Ints code[kRows];
};

// Takes the panel's entries into account. `x` is [channels, kRows], `panel` [channels, kCodes] and `squares`
// [kCodes], |c|^2; `code` is the first entry.
void compare(
    const float* x, const float* panel, const float* squares, int64_t channels, int32_t code,
    Nearest& nearest) {
  Floats products[kRows][kVectors] = {};
  for (int64_t channel = 0; channel < channels; ++channel) {
    Floats codes[kVectors];
    for (int v = 0; v < kVectors; ++v) codes[v] = load(panel + channel * kCodes + v * kLanes);
    for (int row = 0; row < kRows; ++row) {
      for (int v = 0; v < kVectors; ++v) products[row][v] += x[channel * kRows + row] * codes[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const Floats square = load(squares + v * kLanes);
    const Ints codes = lane_numbers() + (code + v * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const Floats distance = square - 2.0f * products[row][v], least = nearest.distance[row];
      // as torch's argmin: NaN is less than any number, and the first one counts
      const Ints nearer = (distance < least) | ((distance != distance) & (least == least));
      nearest.distance[row] = select(nearer, distance, least);
      nearest.code[row] = select(nearer, codes, nearest.code[row]);
    }
  }
}

// Of the lanes: the nearest, of equally near ones the lowest code.
int64_t lowest(Floats distance, Ints code) {
  float least = distance[0];
  int32_t lowest = code[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    const bool is_nan = distance[lane] != distance[lane], least_is_nan = least != least;
    const bool is_equal = distance[lane] == least || (is_nan && least_is_nan);
    const bool is_nearer = distance[lane] < least || (is_nan && !least_is_nan);
    if (is_nearer || (is_equal && code[lane] < lowest)) least = distance[lane], lowest = code[lane];
  }
  return lowest;
}

template <class T, class Code>
void nearest(
    const T* x, const Code* codebook, int64_t rows, int64_t codes, int64_t channels, int64_t* index) {
  const int64_t panels = (codes + kCodes - 1) / kCodes, panel_size = kCodes * channels;
  const Buffer packed(panels * panel_size), squares(panels * kCodes);
  parallel(panels, 1, [&](int64_t p) {
    float* panel = packed.data() + p * panel_size;
    interleave<kCodes>(codebook, p * kCodes, codes, channels, panel);
    Floats square[kVectors] = {};
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int v = 0; v < kVectors; ++v) {
        const Floats c = load(panel + channel * kCodes + v * kLanes);
        square[v] += c * c;
      }
    }
    for (int v = 0; v < kVectors; ++v) store(squares.data() + p * kCodes + v * kLanes, square[v]);
  });

  // some tiles a block, so that a panel is read once for all of them; enough blocks to go round
  const int64_t tiles = (rows + kRows - 1) / kRows, block_tiles = std::clamp<int64_t>(tiles / 32, 1, 8);
  parallel((tiles + block_tiles - 1) / block_tiles, 1, [&](int64_t block) {
    const int64_t first = block * block_tiles, count = std::min(block_tiles, tiles - first);
    const Buffer features(count * kRows * channels);
    std::vector<Nearest> nearest(count);
    for (int64_t tile = 0; tile < count; ++tile) {
      interleave<kRows>(x, (first + tile) * kRows, rows, channels, features.data() + tile * kRows * channels);
      std::fill_n(nearest[tile].distance, kRows, all(std::numeric_limits<float>::infinity()));
      std::fill_n(nearest[tile].code, kRows, Ints{});
    }
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t tile = 0; tile < count; ++tile) {
        compare(
            features.data() + tile * kRows * channels, packed.data() + p * panel_size,
            squares.data() + p * kCodes, channels, static_cast<int32_t>(p * kCodes), nearest[tile]);
      }
    }
    for (int64_t row = first * kRows; row < std::min(rows, (first + count) * kRows); ++row) {
      const Nearest& of_tile = nearest[row / kRows - first];
      index[row] = lowest(of_tile.distance[row % kRows], of_tile.code[row % kRows]);
    }
  });
}

void nearest_code(const Tensor& x, const Tensor& codebook, const Tensor& index) {
  STD_TORCH_CHECK(
      codebook.size(0) < std::numeric_limits<int32_t>::max() - kCodes, "mage_fast_cpu: too many codes");
  for_dtype(x, [&]<class T>(T) {
    for_dtype(codebook, [&]<class Code>(Code) {
      nearest(
          data<T>(x), data<Code>(codebook), x.size(0), codebook.size(0), x.size(1), data<int64_t>(index));
    });
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def("nearest_code(Tensor x, Tensor codebook, Tensor(a!) index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&mage_fast::nearest_code));
}
