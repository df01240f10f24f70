// Kept columns of a weight that lies in rows: every row is read once, and what is kept of it written side by side.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kernels {

// Processors that pack the numbers of a register by a mask take 64 bytes at a time: kept columns as bits.
template <class T>
constexpr bool kPacksByMask =
#if defined(__AVX512VBMI2__)
    true;
#elif defined(__AVX512F__)
    sizeof(T) == 4;
#else
    false;
#endif

// Bit i % 64 of word i / 64 says whether column i is kept; empty where the list is not ascending.
using Mask = std::vector<uint64_t>;
inline Mask mask_of(const int64_t* kept, size_t count, size_t columns) {
  Mask mask((columns + 63) / 64);
  for (size_t i = 0; i < count; ++i) {
    if (i > 0 && kept[i] <= kept[i - 1]) return {};
    mask[kept[i] / 64] |= uint64_t{1} << kept[i] % 64;
  }
  return mask;
}

#if defined(__AVX512F__)
// The numbers of 64 bytes whose bits are set, at `to`, which has room for all 64 bytes; how many there are.
template <class T>
inline size_t pack(const T* from, uint64_t bits, T* to) {
  const __m512i numbers = _mm512_loadu_si512(from);
  __m512i packed = numbers;
  if constexpr (sizeof(T) == 4) packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), numbers);
#if defined(__AVX512VBMI2__)
  if constexpr (sizeof(T) == 2) packed = _mm512_maskz_compress_epi16(static_cast<__mmask32>(bits), numbers);
  if constexpr (sizeof(T) == 1) packed = _mm512_maskz_compress_epi8(static_cast<__mmask64>(bits), numbers);
#endif
  _mm512_storeu_si512(to, packed);
  return __builtin_popcountll(bits);
}

// One row: whole registers as long as both the row and what is left of `to` have room for them.
template <class T>
void pack_row(const T* from, const uint64_t* mask, const int64_t* kept, size_t count, size_t columns, T* to) {
  constexpr size_t kWide = 64 / sizeof(T);
  constexpr uint64_t kAll = kWide == 64 ? ~uint64_t{0} : (uint64_t{1} << kWide % 64) - 1;
  size_t done = 0;
  for (size_t i = 0; i + kWide <= columns && done + kWide <= count; i += kWide) {
    done += pack(from + i, mask[i / 64] >> i % 64 & kAll, to + done);
  }
  for (; done < count; ++done) to[done] = from[kept[done]];
}
#endif

// The kept columns of a weight: a list, and the same as bits where that is faster.
template <class T>
struct Kept {
  Kept(const int64_t* list, size_t count, size_t columns)
      : list(list), count(count), columns(columns), mask(kPacksByMask<T> ? mask_of(list, count, columns) : Mask{}) {}

  void take(const T* row, T* to) const {
#if defined(__AVX512F__)
    if constexpr (kPacksByMask<T>) {
      if (!mask.empty()) return pack_row(row, mask.data(), list, count, columns, to);
    }
#endif
    for (size_t i = 0; i < count; ++i) to[i] = row[list[i]];
  }

  const int64_t* list;
  size_t count, columns;
  Mask mask;
};

// weight [rows, columns], `stride` numbers apart -> y [rows, kept.count].
template <class T, class Threads>
void columns(const T* weight, size_t stride, const Kept<T>& kept, T* y, size_t rows, int threads, Threads run) {
  const size_t tasks = std::max<size_t>(1, std::min<size_t>(threads, rows / 16));
  run(tasks, [&](size_t task) {
    for (size_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) {
      kept.take(weight + row * stride, y + row * kept.count);
    }
  });
}

}  // namespace kernels
