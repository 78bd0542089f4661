// mage_fast_cpu::philox: the words of the counters (j, first_high + i, stream, step), i < high, j < low.
#include "tensors.h"

namespace mage_fast {
namespace {

void philox(const Tensor& state, int64_t stream, int64_t first_high, const Tensor& words) {
  const Philox philox = philox_of(state, stream);
  const int64_t high = words.size(0), low = words.size(1);
  int32_t* out = data<int32_t>(words);
  constexpr int64_t kRun = 512;  // blocks that one thread draws at a time
  const int64_t runs = (low + kRun - 1) / kRun;
  parallel(high * runs, 4, [&](int64_t i) {
    const int64_t row = i / runs, first = i % runs * kRun, count = std::min(kRun, low - first);
    int32_t buffer[(kRun + kBlocks) * 4];
    fill_blocks(philox, first_high + row, first, count, buffer);
    std::memcpy(out + (row * low + first) * 4, buffer, count * 16);
  });
}

}  // namespace
}  // namespace mage_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mage_fast_cpu, m) {
  m.def("philox(Tensor state, int stream, int first_high, Tensor(a!) words) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mage_fast_cpu, CPU, m) { m.impl("philox", TORCH_BOX(&mage_fast::philox)); }
