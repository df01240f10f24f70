// The kernels of this folder for torch tensors on a CPU: plain pointers, so that no header of torch is needed.

#include "columns.h"
#include "grouped.h"
#include "kept_linear.h"

#ifndef PP_FX_VERSION
#error "define PP_FX_VERSION, as pp_fx.native_library does"
#endif

namespace {

struct Threads {  // OpenMP's, which torch uses too
  template <class Task>
  void operator()(size_t tasks, Task task) const {
#pragma omp parallel for num_threads(static_cast<int>(tasks)) schedule(static, 1)
    for (size_t i = 0; i < tasks; ++i) task(i);
  }
};

template <class Run>
int with_type(int type, Run run) {
  if (type == 0) return run(float{}), 0;
  if (type == 1) return run(kernels::Half{}), 0;
  if (type == 2) return run(kernels::BFloat16{}), 0;
  return 1;
}

// What the numbers of a weight are multiplied by: nothing, a scale fp32 for each output feature, or, where `group` is not
// 0, a scale of the input's type and a zero for each group of input features. With scales the numbers are int8.
struct Scales {
  const void* data;
  const int8_t* zeros;
  size_t group;
};

// `run` receives a weight [output features, width].
template <class T, class Run>
void with_rows(const void* data, size_t stride, size_t width, Scales scales, Run run) {
  const auto* numbers = static_cast<const int8_t*>(data);
  if (scales.group) {
    run(kernels::Grouped<T>{numbers, stride, width, static_cast<const T*>(scales.data), scales.zeros, scales.group});
  } else if (scales.data) {
    run(kernels::Matrix<int8_t>{numbers, stride, width, static_cast<const float*>(scales.data)});
  } else {
    run(kernels::Matrix<T>{static_cast<const T*>(data), stride, width});
  }
}

// A weight of the kind of another one, [input features, width].
template <class W>
kernels::Matrix<W> columns_like(kernels::Matrix<W>, const void* data, size_t stride, size_t width, Scales scales) {
  return {static_cast<const W*>(data), stride, width, static_cast<const float*>(scales.data)};
}
template <class T>
kernels::GroupedColumns<T> columns_like(kernels::Grouped<T>, const void* data, size_t stride, size_t width,
                                        Scales scales) {
  return {static_cast<const int8_t*>(data), stride, width, static_cast<const T*>(scales.data), scales.zeros,
          scales.group};
}

}  // namespace

extern "C" {

#define PP_FX_EXPORT __attribute__((visibility("default")))

PP_FX_EXPORT const char* pp_fx_kernels_version() { return PP_FX_VERSION; }

// Whether this processor multiplies pairs of bf16 (bfloat16.h).
PP_FX_EXPORT int pp_fx_multiplies_pairs() { return kernels::kMultipliesPairs; }

// x [tokens, depth], weight [rows, depth] -> x weight^T + bias [tokens, rows]. Types: 0 fp32, 1 fp16, 2 bf16.
PP_FX_EXPORT int pp_fx_linear(int type, const void* weight, size_t stride, const void* scales, const int8_t* zeros,
                              size_t group, const void* bias, const void* x, void* y, size_t tokens, size_t rows,
                              size_t depth, int threads) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    with_rows<T>(weight, stride, depth, {scales, zeros, group}, [&](auto matrix) {
      kernels::linear(matrix, static_cast<const T*>(bias), static_cast<const T*>(x), static_cast<T*>(y), tokens, rows,
                      threads, Threads{});
    });
  });
}

// codes: int8 [rows, groups * 64] (bits 8), or uint8 [rows, groups * 32] (bits 4); scales bf16 [rows, groups]; y fp32.
PP_FX_EXPORT int pp_fx_coded_linear(int type, int bits, const void* codes, const void* scales, const void* x, float* y,
                                    size_t tokens, size_t rows, size_t depth, int threads) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    auto run = [&](auto* typed) {
      kernels::coded_linear(typed, static_cast<const kernels::BFloat16*>(scales), static_cast<const T*>(x), y, tokens,
                            rows, depth, threads, Threads{});
    };
    bits == 8 ? run(static_cast<const int8_t*>(codes)) : run(static_cast<const uint8_t*>(codes));
  });
}

// y [tokens, channels]; strength [tokens, channels], x [tokens, depth], weight [channels, depth].
PP_FX_EXPORT int pp_fx_chosen_linear(int type, const float* strength, const void* weight, size_t stride,
                                     const void* scales, const int8_t* zeros, size_t group, const void* bias,
                                     const void* x, void* y, size_t tokens, size_t channels, size_t depth,
                                     size_t count, int threads) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    with_rows<T>(weight, stride, depth, {scales, zeros, group}, [&](auto matrix) {
      kernels::chosen_linear(strength, matrix, static_cast<const T*>(bias), static_cast<const T*>(x),
                             static_cast<T*>(y), tokens, channels, count, threads, Threads{});
    });
  });
}

// y [tokens, out]; strength and factor [tokens, channels], x [tokens, depth], up [channels, depth] or null, down
// [channels, out], scaled alike.
PP_FX_EXPORT int pp_fx_strongest(int type, const float* strength, const void* factor, const void* x, const void* up,
                                 size_t up_stride, const void* up_scales, const int8_t* up_zeros, size_t up_group,
                                 const void* up_bias, const void* down, size_t down_stride, const void* down_scales,
                                 const int8_t* down_zeros, size_t down_group, const void* down_bias, void* y,
                                 size_t tokens, size_t channels, size_t depth, size_t out, size_t count, int threads) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    auto of = [](const void* p) { return static_cast<const T*>(p); };
    const Scales of_down = {down_scales, down_zeros, down_group};
    const Scales of_up = up ? Scales{up_scales, up_zeros, up_group} : of_down;
    with_rows<T>(up, up_stride, depth, of_up, [&](auto rows) {
      kernels::strongest(strength, of(factor), of(x), rows, of(up_bias),
                         columns_like(rows, down, down_stride, out, of_down), of(down_bias), static_cast<T*>(y), tokens,
                         channels, count, threads, Threads{});
    });
  });
}

// weight [rows, columns] of numbers of `size` bytes (1, 2, 4) -> y [rows, count]; kept int64 [count], in [0, columns).
PP_FX_EXPORT int pp_fx_columns(int size, const void* weight, size_t stride, const int64_t* kept, size_t count, void* y,
                               size_t rows, size_t columns, int threads) {
  auto run = [&](auto one) {
    using T = decltype(one);
    kernels::columns(static_cast<const T*>(weight), stride, kernels::Kept<T>(kept, count, columns), static_cast<T*>(y),
                     rows, threads, Threads{});
    return 0;
  };
  if (size == 1) return run(uint8_t{});
  if (size == 2) return run(uint16_t{});
  if (size == 4) return run(uint32_t{});
  return 1;
}

// All bf16: x [tokens, depth], weight [.., depth] -> x weight[kept]^T [tokens, count]; 1 where the processor cannot.
PP_FX_EXPORT int pp_fx_kept_rows_linear(const void* weight, size_t stride, const int64_t* kept, size_t count,
                                        const void* x, void* y, size_t tokens, size_t depth, int threads) {
  return kernels::kept_rows_linear(static_cast<const kernels::BFloat16*>(weight), stride, kept, count,
                                   static_cast<const kernels::BFloat16*>(x), static_cast<kernels::BFloat16*>(y), tokens,
                                   depth, threads, Threads{});
}
}
