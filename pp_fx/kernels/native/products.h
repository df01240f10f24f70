// Products of few rows with weights that are read once, from memory, in the order in which they lie there.
//
// Compiler vectors (GCC, Clang) as wide as the machine's registers: GCC keeps wider ones in memory. Sums are in fp32.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kernels {

#if defined(__AVX512F__)
constexpr size_t kLanes = 16;
#elif defined(__AVX2__)
constexpr size_t kLanes = 8;
#else
constexpr size_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

using Half = _Float16;
struct BFloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(Half x) { return static_cast<float>(x); }
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, Half& y) { y = static_cast<Half>(x); }
inline void narrow(float x, BFloat16& y) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  y.bits = std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Lanes load(const float* p) {
  Lanes lanes;
  std::memcpy(&lanes, p, sizeof lanes);
  return lanes;
}
// Halves and bytes by instructions of their own: compilers widen them one by one.
inline Lanes load(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && defined(__F16C__)
  return reinterpret_cast<Lanes>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  typedef Half Halves __attribute__((vector_size(kLanes * sizeof(Half))));
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return __builtin_convertvector(halves, Lanes);
#endif
}
inline Lanes load(const BFloat16* p) {
  typedef uint16_t Shorts __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  Shorts shorts;
  std::memcpy(&shorts, p, sizeof shorts);
  return reinterpret_cast<Lanes>(__builtin_convertvector(shorts, Words) << 16);
}
inline Lanes load(const int8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(
      _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Lanes);
#endif
}
inline void store(Lanes lanes, float* p) { std::memcpy(p, &lanes, sizeof lanes); }

inline float sum(Lanes lanes) {
  float s[kLanes], total = 0;
  std::memcpy(s, &lanes, sizeof lanes);
  for (size_t width = kLanes / 2; width; width /= 2)
    for (size_t i = 0; i < width; ++i) s[i] += s[i + width];
  total = s[0];
  return total;
}

// out[r][c] = sum over k of w[r][k] * x[c * depth + k], for R rows of weights and C rows of x, in A chains of additions.
//
// R = 1 reads the memory as one stream, which for few rows of x is all that counts.
template <int R, int C, int A, class T>
inline void dots(const T* const (&w)[4], const float* x, size_t depth, float (&out)[4][4], int first = 0) {
  Lanes sums[R][C][A] = {};
  size_t k = 0;
  for (; k + A * kLanes <= depth; k += A * kLanes)
    for (int a = 0; a < A; ++a) {
      Lanes rows[C];
      for (int c = 0; c < C; ++c) rows[c] = load(x + c * depth + k + a * kLanes);
      for (int r = 0; r < R; ++r) {
        const Lanes weight = load(w[first + r] + k + a * kLanes);
        for (int c = 0; c < C; ++c) sums[r][c][a] += weight * rows[c];
      }
    }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      for (int a = 1; a < A; ++a) sums[r][c][0] += sums[r][c][a];
      float total = sum(sums[r][c][0]);
      for (size_t rest = k; rest < depth; ++rest) total += widen(w[first + r][rest]) * x[c * depth + rest];
      out[first + r][c] = total;
    }
}

// As above, for 4 rows of weights and all `rows` of x; `take(row, ...)` receives the four sums of one row of x.
template <class T, class Take>
inline void dots_of_rows(const T* const (&w)[4], const float* x, size_t rows, size_t depth, Take take) {
  constexpr int kAtOnce = kLanes == 16 ? 4 : 2;  // rows of weights: processors without AVX-512 hold half as many sums
  float out[4][4];
  for (size_t m = 0; m < rows;) {
    const float* part = x + m * depth;
    const size_t taken = std::min<size_t>(rows - m, 4);
    for (int r = 0; r < 4 && taken == 4; r += kAtOnce) dots<kAtOnce, 4, 1>(w, part, depth, out, r);
    for (int r = 0; r < 4 && taken < 4; ++r) {
      if (taken == 3) dots<1, 3, 2>(w, part, depth, out, r);
      if (taken == 2) dots<1, 2, 2>(w, part, depth, out, r);
      if (taken == 1) dots<1, 1, 4>(w, part, depth, out, r);
    }
    for (size_t c = 0; c < taken; ++c) take(m + c, out[0][c], out[1][c], out[2][c], out[3][c]);
    m += taken;
  }
}

// y[m, n] += sum over k in [first, last) of x[m, k] * w[k, n]; sixteen rows of weights at a time.
template <class T>
inline void add_rows(const T* w, const float* x, float* y, size_t rows, size_t depth, size_t width, size_t first,
                     size_t last) {
  constexpr size_t kRows = 16;
  size_t k = first;
  for (; k + kRows <= last; k += kRows) {
    size_t n = 0;
    for (; n + kLanes <= width; n += kLanes) {
      Lanes weights[kRows];
      for (size_t i = 0; i < kRows; ++i) weights[i] = load(w + (k + i) * width + n);
      for (size_t m = 0; m < rows; ++m) {
        Lanes even = load(y + m * width + n), odd = {};  // two chains of additions
        for (size_t i = 0; i < kRows; i += 2) {
          even += weights[i] * x[m * depth + k + i];
          odd += weights[i + 1] * x[m * depth + k + i + 1];
        }
        store(even + odd, y + m * width + n);
      }
    }
    for (; n < width; ++n)
      for (size_t m = 0; m < rows; ++m)
        for (size_t i = 0; i < kRows; ++i) y[m * width + n] += x[m * depth + k + i] * widen(w[(k + i) * width + n]);
  }
  for (; k < last; ++k)
    for (size_t m = 0; m < rows; ++m)
      for (size_t n = 0; n < width; ++n) y[m * width + n] += x[m * depth + k] * widen(w[k * width + n]);
}

// Lower Cholesky factor of a symmetric [n, n], in place; false where the matrix is not positive definite.
inline bool cholesky(float* a, size_t n) {
  for (size_t j = 0; j < n; ++j) {
    const float* row = a + j * n;
    for (size_t i = j; i < n; ++i) {
      const float* other = a + i * n;
      Lanes lanes = {};
      size_t k = 0;
      for (; k + kLanes <= j; k += kLanes) lanes += load(row + k) * load(other + k);
      float rest = a[i * n + j] - sum(lanes);
      for (; k < j; ++k) rest -= row[k] * other[k];
      if (i == j) {
        if (!(rest > 0)) return false;
        a[j * n + j] = std::sqrt(rest);
      } else {
        a[i * n + j] = rest / a[j * n + j];
      }
    }
  }
  return true;
}

// y[k, :] -= factor(k, i) * y[i, :] for i in [first, last), then y[k, :] /= pivot; columns [from, to) of a [n, width] y.
template <class Factor>
inline void eliminate(float* y, size_t width, size_t from, size_t to, size_t k, size_t first, size_t last, float pivot,
                      Factor factor) {
  size_t c = from;
  for (; c + kLanes <= to; c += kLanes) {
    Lanes even = load(y + k * width + c), odd = {};
    size_t i = first;
    for (; i + 2 <= last; i += 2) {
      even -= factor(i) * load(y + i * width + c);
      odd -= factor(i + 1) * load(y + (i + 1) * width + c);
    }
    if (i < last) even -= factor(i) * load(y + i * width + c);
    store((even + odd) / pivot, y + k * width + c);
  }
  for (; c < to; ++c) {
    float value = y[k * width + c];
    for (size_t i = first; i < last; ++i) value -= factor(i) * y[i * width + c];
    y[k * width + c] = value / pivot;
  }
}

// Columns [from, to) of y become (L L^T)^-1 of themselves; `l` is the factor [n, n], `y` is [n, width].
inline void solve_columns(const float* l, float* y, size_t n, size_t width, size_t from, size_t to) {
  for (size_t k = 0; k < n; ++k) eliminate(y, width, from, to, k, 0, k, l[k * n + k], [&](size_t i) { return l[k * n + i]; });
  for (size_t k = n; k-- > 0;)
    eliminate(y, width, from, to, k, k + 1, n, l[k * n + k], [&](size_t i) { return l[i * n + k]; });
}

}  // namespace kernels
