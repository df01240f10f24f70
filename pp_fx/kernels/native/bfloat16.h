// Products of up to a dozen rows of bf16 with a weight of bf16 that is read once, by AVX-512's own pairs of bf16.
#pragma once

#include <algorithm>

#include "products.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PP_FX_PAIRS
#endif

namespace kernels {

#ifdef PP_FX_PAIRS
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif

#ifdef PP_FX_PAIRS

constexpr size_t kPairs = 32;  // numbers of bf16 in a register

inline __m512bh load_pairs(const BFloat16* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
inline __m512bh load_pairs(const BFloat16* p, size_t count) {
  return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, p));
}

// out[r][c] = w[r] . x[c] for R rows of weights and C rows of x; meanwhile the rows `next` come out of the memory.
template <size_t R, size_t C>
inline void pair_dots(const BFloat16* const (&w)[R], const BFloat16* const (&next)[R], const BFloat16* x, size_t depth,
                      float (&out)[R][C]) {
  constexpr int kChains = R * C >= 8 ? 1 : R * C >= 4 ? 2 : 4;  // of additions, for each sum
  __m512 sums[R][C][kChains] = {};
  size_t k = 0;
  for (; k + kChains * kPairs <= depth; k += kChains * kPairs)
    for (int a = 0; a < kChains; ++a) {
      const size_t at = k + a * kPairs;
      __m512bh weights[R];
      for (size_t r = 0; r < R; ++r) {
        __builtin_prefetch(next[r] + at, 0, 2);
        weights[r] = load_pairs(w[r] + at);
      }
      for (size_t c = 0; c < C; ++c) {
        const __m512bh row = load_pairs(x + c * depth + at);
        for (size_t r = 0; r < R; ++r) sums[r][c][a] = _mm512_dpbf16_ps(sums[r][c][a], row, weights[r]);
      }
    }
  for (; k < depth; k += kPairs) {
    const size_t count = std::min(kPairs, depth - k);
    const bool whole = count == kPairs;
    for (size_t c = 0; c < C; ++c) {
      const __m512bh row = whole ? load_pairs(x + c * depth + k) : load_pairs(x + c * depth + k, count);
      for (size_t r = 0; r < R; ++r) {
        const __m512bh weight = whole ? load_pairs(w[r] + k) : load_pairs(w[r] + k, count);
        sums[r][c][0] = _mm512_dpbf16_ps(sums[r][c][0], row, weight);
      }
    }
  }
  for (size_t r = 0; r < R; ++r)
    for (size_t c = 0; c < C; ++c) {
      for (int a = 1; a < kChains; ++a) sums[r][c][0] = _mm512_add_ps(sums[r][c][0], sums[r][c][a]);
      out[r][c] = _mm512_reduce_add_ps(sums[r][c][0]);
    }
}

// R rows of the weights from `r` on, `row(r)`, below `last`, with `count` rows of x, C or fewer at a time.
template <size_t R, size_t C, class Row, class Take>
void pair_products(Row row, const BFloat16* x, size_t count, size_t depth, size_t r, size_t last, Take take) {
  constexpr size_t kAheadOfPairs = 8;
  const BFloat16 *w[R], *next[R];
  for (size_t i = 0; i < R; ++i) {
    w[i] = row(r + i);
    next[i] = row(std::min(r + i + kAheadOfPairs, last - 1));
  }
  size_t m = 0;
  for (; m + C <= count; m += C) {
    float out[R][C];
    pair_dots<R, C>(w, next, x + m * depth, depth, out);
    for (size_t i = 0; i < R; ++i)
      for (size_t c = 0; c < C; ++c) take(m + c, r + i, out[i][c]);
  }
  if constexpr (C > 1) {
    if (m < count) {
      pair_products<R, C - 1>(row, x + m * depth, count - m, depth, r, last,
                              [&](size_t c, size_t i, float sum) { take(m + c, i, sum); });
    }
  }
}

// Rows [first, last) of the weights with `count` rows of x, any number; `take(c, r, sum)`.
template <class Row, class Take>
void pair_products(Row row, const BFloat16* x, size_t count, size_t depth, size_t first, size_t last, Take take) {
  size_t r = first;
  for (; r + 4 <= last; r += 4) pair_products<4, 6>(row, x, count, depth, r, last, take);
  for (; r < last; ++r) pair_products<1, 6>(row, x, count, depth, r, last, take);
}

#endif

}  // namespace kernels
