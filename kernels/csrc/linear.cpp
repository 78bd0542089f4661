// A linear layer, y = x W^T + bias, and its gradients: products of packed panels.
//
// A panel is some columns of the right factor, laid out as the kernel reads it. The thread that multiplies with
// a panel packs it just before, so that it comes from that core's cache: the weight is read once, and rounded to
// bfloat16 on the way where the activations are bfloat16. Each element of a result is one thread's sum in a
// fixed order.
//
// With AVX-512 only: with narrower vectors these are no faster than torch's products.
#include "matmul.h"
#include "matmul_bfloat16.h"
#include "tensors.h"

#if defined(__AVX512F__)

namespace mage_fast {
namespace {

// Rows of the right factor that are multiplied with at a time where the result is in float: a panel of them and
// what the left factor gives to a tile fit the second-level cache.
constexpr int64_t kFloatDepth = 256, kPairDepth = 1536;

// Factors in float.
template <class T>
struct Panels {
  static constexpr int64_t kColumns = kTileColumns;
  using Memory = Buffer;
  static int64_t size(int64_t depth) { return depth * kColumns; }

  template <class W>
  static void pack_rows(const W* from, int64_t stride, int64_t columns, int64_t depth, float* panel) {
    copy_rows(from, stride, depth, columns, {panel, kColumns});
  }
  template <class W>
  static void pack_columns(const W* from, int64_t stride, int64_t columns, int64_t depth, float* panel) {
    copy_transposed(from, stride, columns, depth, {panel, kColumns});
  }
  // c = a panel + bias; a transposed is given by its columns, and c then has no bias.
  template <bool kTransposed>
  static void multiply(
      const float* a, int64_t a_stride, const float* panel, int64_t rows, int64_t columns, int64_t depth,
      const float* bias, float* c, int64_t c_stride) {
    const Matrix left{const_cast<float*>(a), a_stride}, right{const_cast<float*>(panel), kColumns};
    const int64_t whole = whole_vectors(columns);
    if (whole == columns) {
      if (bias) {
        for (int64_t row = 0; row < rows; ++row) std::copy_n(bias, columns, c + row * c_stride);
      }
      return mage_fast::multiply<kTransposed>(
          left, right, rows, columns, depth, bias != nullptr, {c, c_stride}, kFloatDepth);
    }
    const Buffer buffer(rows * whole);
    mage_fast::multiply<kTransposed>(left, right, rows, whole, depth, false, {buffer.data(), whole}, kFloatDepth);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < columns; ++i) c[row * c_stride + i] = buffer.data()[row * whole + i] + (bias ? bias[i] : 0.0f);
    }
  }
};

// Factors in bfloat16, two by two.
template <>
struct Panels<BFloat16> {
  static constexpr int64_t kColumns = kPanelColumns;
  using Memory = PanelBuffer;
  static int64_t size(int64_t depth) { return panel_size(depth); }

  template <class W>
  static void pack_rows(const W* from, int64_t stride, int64_t columns, int64_t depth, BFloat16* panel) {
    mage_fast::pack_rows(from, stride, columns, depth, panel);
  }
  template <class W>
  static void pack_columns(const W* from, int64_t stride, int64_t columns, int64_t depth, BFloat16* panel) {
    mage_fast::pack_columns(from, stride, columns, depth, panel);
  }
  template <bool kTransposed>
  static void multiply(
      const BFloat16* a, int64_t a_stride, const BFloat16* panel, int64_t rows, int64_t columns, int64_t depth,
      const float* bias, BFloat16* c, int64_t c_stride) {
    static_assert(!kTransposed);
    multiply_panel({a, a_stride, 2}, panel, rows, columns, depth, bias, false, c, c_stride);
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// c = a b + bias, panel by panel: pack(first, columns, panel). Where there are fewer panels than threads the
// rows are split too.
template <class T, class Pack>
void multiply_panels(
    const T* a, int64_t rows, int64_t columns, int64_t depth, const float* bias, T* c, const Pack& pack) {
  using P = Panels<T>;
  const int64_t panels = ceil_div(columns, P::kColumns), threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(threads / std::max<int64_t>(panels, 1), 1, ceil_div(rows, 64));
  const int64_t part_rows = ceil_div(rows, parts);
  parallel_in_turn(panels * parts, [&](int64_t task) {
    const int64_t first = task / parts * P::kColumns, width = std::min(P::kColumns, columns - first);
    const int64_t row = task % parts * part_rows, some = std::min(part_rows, rows - row);
    if (some <= 0) return;
    const typename P::Memory panel(P::size(depth));
    pack(first, width, panel.data());
    P::template multiply<false>(
        a + row * depth, depth, panel.data(), some, width, depth, bias ? bias + first : nullptr, c + row * columns + first,
        columns);
  });
}

// bias_gradient[c] = sum over the rows, in sums of 64 rows
template <class T>
void sum_rows(const T* grad, int64_t rows, int64_t columns, float* sums) {
  parallel(ceil_div(columns, kTileColumns), rows_of_task(rows * kTileColumns), [&](int64_t block) {
    const int64_t first = block * kTileColumns;
    for_vectors(std::min(kTileColumns, columns - first), [&](int64_t offset, auto count) {
      Floats total{};
      for (int64_t begin = 0; begin < rows; begin += 64) {
        Floats part{};
        for (int64_t row = begin; row < std::min(rows, begin + 64); ++row) {
          part += load(grad + row * columns + first + offset, count);
        }
        total += part;
      }
      store(sums + first + offset, total, count);
    });
  });
}

// grad_weight = grad^T x
void weight_gradient(const float* grad, const float* x, int64_t rows, int64_t out, int64_t in, float* to) {
  using P = Panels<float>;
  parallel_in_turn(ceil_div(in, P::kColumns), [&](int64_t index) {
    const int64_t first = index * P::kColumns, width = std::min(P::kColumns, in - first);
    const Buffer panel(P::size(rows));
    P::pack_rows(x + first, in, width, rows, panel.data());
    P::multiply<true>(grad, out, panel.data(), out, width, rows, nullptr, to + first, in);
  });
}

// c = block^T or, to add, c + block^T, for a block of so many rows and columns.
void store_transposed(const float* block, int64_t rows, int64_t columns, bool add, float* c, int64_t stride) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      Floats x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(block + (row + i) * kPanelColumns + column);
      transpose(x);
      const int64_t count = std::min<int64_t>(kLanes, rows - row);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, columns - column); ++i) {
        float* to = c + (column + i) * stride + row;
        store(to, add ? load(to, count) + x[i] : x[i], count);
      }
    }
  }
}

// The smaller of grad and x is the left factor, whose panels every thread reads: where that is x, the product is
// the gradient transposed.
void weight_gradient(
    const BFloat16* grad, const BFloat16* x, int64_t rows, int64_t out, int64_t in, float* to) {
  const bool transposed = in < out;
  const BFloat16 *left = transposed ? x : grad, *right = transposed ? grad : x;
  const int64_t left_columns = std::min(in, out), right_columns = std::max(in, out);
  const Pieces pieces(rows, kPairDepth, 2);
  const int64_t size = panel_size(pieces.size), left_panels = ceil_div(left_columns, kPanelColumns);
  const PanelBuffer left_buffer(left_panels * size);
  for (int64_t start = 0; start < rows; start += pieces.size) {
    const int64_t some = pieces.length(start);
    // the left factor's pairs are along its columns too: its panels are packed as the right one's
    parallel_in_turn(left_panels, [&](int64_t index) {
      const int64_t first = index * kPanelColumns, width = std::min(kPanelColumns, left_columns - first);
      pack_rows(left + start * left_columns + first, left_columns, width, some, left_buffer.data() + index * size);
    });
    parallel_in_turn(ceil_div(right_columns, kPanelColumns), [&](int64_t index) {
      const int64_t first = index * kPanelColumns, width = std::min(kPanelColumns, right_columns - first);
      const PanelBuffer panel(size);
      pack_rows(right + start * right_columns + first, right_columns, width, some, panel.data());
      for (int64_t row = 0; row < left_columns; row += kPanelColumns) {
        const Pairs pairs{left_buffer.data() + row / kPanelColumns * size, 2, 2 * kPanelColumns};
        const int64_t tall = std::min(kPanelColumns, left_columns - row);
        const auto multiply = [&](bool add, float* c, int64_t stride) {
          multiply_panel<float>(pairs, panel.data(), tall, width, some, nullptr, add, c, stride);
        };
        if (transposed) {
          alignas(64) float block[kPanelColumns * kPanelColumns];
          multiply(false, block, kPanelColumns);
          store_transposed(block, tall, width, start > 0, to + first * in + row, in);
        } else {
          multiply(start > 0, to + row * in + first, in);
        }
      }
    });
  }
}

// f(T{}, W{}): dtypes of the activations and of the weight. Float activations have a float weight.
template <class F>
void for_dtypes(const Tensor& x, const Tensor& weight, const F& f) {
  if (x.scalar_type() == ScalarType::Float) return f(float{}, float{});
  STD_TORCH_CHECK(has_bfloat16_dot(), "mage_fast_cpu: this processor has no bfloat16 dot product");
  for_dtype(weight, [&]<class W>(W) { f(BFloat16{}, W{}); });
}

void linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& to) {
  const int64_t in = weight.size(1);
  for_dtypes(x, weight, [&]<class T, class W>(T, W) {
    const W* w = data<W>(weight);
    multiply_panels(
        data<T>(x), x.size(0), weight.size(0), in, data<float>(bias), data<T>(to),
        [&](int64_t first, int64_t width, auto* panel) {
          Panels<T>::pack_columns(w + first * in, in, width, in, panel);
        });
  });
}

void linear_grad_input(const Tensor& grad, const Tensor& weight, const Tensor& to) {
  const int64_t out = weight.size(0), in = weight.size(1);
  for_dtypes(grad, weight, [&]<class T, class W>(T, W) {
    const W* w = data<W>(weight);
    multiply_panels(
        data<T>(grad), grad.size(0), in, out, nullptr, data<T>(to),
        [&](int64_t first, int64_t width, auto* panel) {
          Panels<T>::pack_rows(w + first, in, width, out, panel);
        });
  });
}

void linear_grad_weight(
    const Tensor& grad, const Tensor& x, std::optional<Tensor> to, std::optional<Tensor> grad_bias) {
  const int64_t rows = grad.size(0), out = grad.size(1), in = x.size(1);
  for_dtypes(grad, grad, [&]<class T, class W>(T, W) {
    if (to.has_value()) weight_gradient(data<T>(grad), data<T>(x), rows, out, in, data<float>(*to));
    if (grad_bias.has_value()) sum_rows(data<T>(grad), rows, out, data<float>(*grad_bias));
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) to) -> ()");
  m.def("linear_grad_input(Tensor grad, Tensor weight, Tensor(a!) to) -> ()");
  m.def("linear_grad_weight(Tensor grad, Tensor x, Tensor(a!)? to, Tensor(b!)? grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&mage_fast::linear));
  m.impl("linear_grad_input", TORCH_BOX(&mage_fast::linear_grad_input));
  m.impl("linear_grad_weight", TORCH_BOX(&mage_fast::linear_grad_weight));
}

#endif  // __AVX512F__
