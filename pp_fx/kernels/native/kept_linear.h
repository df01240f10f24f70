// Products of some dozens of rows of bf16 with the kept rows of a weight, which are read where they lie.
#pragma once

#include "bfloat16.h"

namespace kernels {

// Returns 0, or 1 where this processor does not multiply pairs of bf16.
template <class Threads>
int kept_rows_linear(const BFloat16* weight, size_t stride, const int64_t* kept, size_t count, const BFloat16* x,
                     BFloat16* y, size_t tokens, size_t depth, int threads, Threads run) {
#ifdef PP_FX_PAIRS
  const size_t tasks = std::max<size_t>(1, std::min<size_t>(threads, count / 16));
  run(tasks, [&](size_t task) {
    pair_products([&](size_t r) { return weight + kept[r] * stride; }, x, tokens, depth, count * task / tasks,
                  count * (task + 1) / tasks, [&](size_t t, size_t r, float sum) { narrow(sum, y[t * count + r]); });
  });
  return 0;
#else
  return 1;
#endif
}

}  // namespace kernels
