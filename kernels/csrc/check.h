// Argument checks of the CPU ops: they name op, argument and what was wanted.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace mage_fast {

inline void check_rng_state(const torch::stable::Tensor& state, const char* op) {
  STD_TORCH_CHECK(
      state.scalar_type() == torch::headeronly::ScalarType::Long && state.dim() == 1 &&
          state.size(0) == 2 && state.is_contiguous(),
      op, ": rng_state must be a contiguous int64 tensor (seed, step)");
}

}  // namespace mage_fast
