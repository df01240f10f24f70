// The operators with quantized weights (export/quantized_functions.py says what each computes); all numbers beside them are fp32.
#pragma once

#include "abi.h"
#include "quantized.h"
#include "strongest.h"

namespace quantized_ops {

using ort::Tensor;

constexpr size_t kFew = 8;  // tokens up to which a weight is not packed

// codes [rows, blocks, 16 or 32] and scales [rows, blocks] or [rows, blocks, 1]; false where they are none
inline bool blocks_of(const Tensor& codes, const Tensor& scales, size_t depth, kernels::Blocks* blocks) {
  if (codes.rank != 3 || (codes.last() != 16 && codes.last() != 32) || scales.rank < 2) return false;
  const size_t width = static_cast<size_t>(codes.shape[1]);
  *blocks = {static_cast<const uint8_t*>(codes.data), static_cast<const float*>(scales.data), width, codes.last() / 4};
  return scales.shape[0] == codes.shape[0] && scales.shape[1] == codes.shape[1] &&
         width == (depth + kernels::kBlock - 1) / kernels::kBlock;
}

inline const float* numbers(const Tensor& t) { return static_cast<const float*>(t.data); }

// X [..., H], codes and scales of a weight [N, H], kept int64 [k] -> X weight[kept]^T [..., k]
inline OrtStatus* rows(OrtKernelContext* context) {
  const Tensor x = ort::input(context, 0), codes = ort::input(context, 1), scales = ort::input(context, 2);
  const Tensor kept = ort::input(context, 3);
  if (auto* error = ort::first_error({&x, &codes, &scales, &kept})) return error;
  kernels::Blocks weight{};
  if (x.rank < 1 || kept.rank != 1 || !blocks_of(codes, scales, x.last(), &weight))
    return ort::invalid("pp_fx.QuantizedRows: X [..., H], codes, scales and kept [k] do not fit each other");
  const size_t width = static_cast<size_t>(kept.shape[0]);
  const int64_t* index = static_cast<const int64_t*>(kept.data);
  for (size_t i = 0; i < width; ++i)
    if (index[i] < 0 || index[i] >= codes.shape[0]) return ort::invalid("pp_fx.QuantizedRows: kept is out of range");
  void* out = nullptr;
  if (auto* error = ort::output_like(context, x, width, &out)) return error;
  if (!x.rows() || !width) return nullptr;
  OrtStatus* failed = nullptr;
  kernels::rows_linear(numbers(x), weight, index, static_cast<float*>(out), x.rows(), x.last(), width,
                       [&](size_t tasks, auto task) { failed = ort::parallel_for(context, tasks, task); });
  return failed;
}

// X [..., C], codes int8 [C, O] with scales [O] -> X (codes * scales) [..., O]
inline OrtStatus* output(OrtKernelContext* context) {
  const Tensor x = ort::input(context, 0), codes = ort::input(context, 1), scales = ort::input(context, 2);
  if (auto* error = ort::first_error({&x, &codes, &scales})) return error;
  if (x.rank < 1 || codes.rank != 2 || scales.rank != 1 || static_cast<size_t>(codes.shape[0]) != x.last() ||
      scales.shape[0] != codes.shape[1])
    return ort::invalid("pp_fx.QuantizedOutput: X [..., C], codes [C, O] and scales [O] do not fit each other");
  void* out = nullptr;
  if (auto* error = ort::output_like(context, x, codes.last(), &out)) return error;
  if (!x.rows() || !codes.last()) return nullptr;
  OrtStatus* failed = nullptr;
  auto parallel_for = [&](size_t tasks, auto task) { failed = ort::parallel_for(context, tasks, task); };
  const int8_t* weight = static_cast<const int8_t*>(codes.data);
  if (x.rows() <= kFew) {  // the weight is read once, where it lies
    const kernels::Chosen all = kernels::every(x.rows(), x.last());
    const float* no_bias = nullptr;
    kernels::sum_of_chosen(all, kernels::Matrix<int8_t>{weight, codes.last(), codes.last(), numbers(scales)}, no_bias,
                           static_cast<float*>(out), x.rows(), ort::kTasksOfStep,
                           kernels::factors(all, numbers(x), x.rows(), x.last()), parallel_for);
  } else {
    kernels::output_linear(numbers(x), weight, numbers(scales), static_cast<float*>(out), x.rows(), x.last(),
                           codes.last(), parallel_for);
  }
  return failed;
}

// strength and factor [N, C]; if `gated` X [N, H], codes and scales of up [C, H], up_bias [C]; down int8 [C, O] with scales
// [O], count int64 [1]: see Strongest -> [N, O]
template <bool gated>
OrtStatus* strongest(OrtKernelContext* context) {
  const Tensor strength = ort::input(context, 0), factor = ort::input(context, 1);
  const size_t next = gated ? 6 : 2;
  const Tensor x = ort::input(context, gated ? 2 : 1), codes = ort::input(context, gated ? 3 : 1);
  const Tensor scales = ort::input(context, gated ? 4 : 1), bias = ort::input(context, gated ? 5 : 1);
  const Tensor down = ort::input(context, next), down_scales = ort::input(context, next + 1);
  const Tensor count = ort::input(context, next + 2);
  if (auto* error = ort::first_error({&strength, &factor, &x, &codes, &scales, &bias, &down, &down_scales, &count}))
    return error;
  bool fits = strength.rank == 2 && factor.rank == 2 && down.rank == 2 && down_scales.rank == 1 && count.rank == 1 &&
              count.shape[0] == 1 && factor.shape[0] == strength.shape[0] && factor.shape[1] == strength.shape[1] &&
              down.shape[0] == strength.shape[1] && down_scales.shape[0] == down.shape[1];
  kernels::Blocks up{};
  if (gated)
    fits = fits && x.rank == 2 && bias.rank == 1 && x.shape[0] == strength.shape[0] &&
           blocks_of(codes, scales, x.last(), &up) && codes.shape[0] == strength.shape[1] &&
           bias.shape[0] == strength.shape[1];
  if (!fits) return ort::invalid("pp_fx.QuantizedStrongest: strength, factor, X, up and down do not fit each other");
  const size_t channels = strength.last();
  const int64_t asked = *static_cast<const int64_t*>(count.data);
  if (asked < 1 || static_cast<size_t>(asked) > channels)
    return ort::invalid("pp_fx.QuantizedStrongest: count and the number of channels do not fit each other");
  const int64_t shape[] = {strength.shape[0], down.shape[1]};
  void* out = nullptr;
  if (auto* error = ort::output(context, shape, 2, &out)) return error;
  if (!strength.rows() || !down.last()) return nullptr;
  OrtStatus* failed = nullptr;
  kernels::quantized_strongest(numbers(strength), numbers(factor), numbers(x), up, gated ? numbers(bias) : nullptr,
                             {static_cast<const int8_t*>(down.data), down.last(), down.last(), numbers(down_scales)},
                             static_cast<float*>(out), strength.rows(), channels, x.last(), asked, ort::kTasksOfStep,
                             [&](size_t tasks, auto task) { failed = ort::parallel_for(context, tasks, task); });
  return failed;
}

}  // namespace quantized_ops
