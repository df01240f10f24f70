// Weights of int8 numbers of which a group along a row shares a scale and a zero: (number - zero) * scale.
#pragma once

#include <vector>

#include "strongest.h"

namespace kernels {

template <class T>
struct Grouped {  // a row for each output feature
  const int8_t* data;
  size_t stride, width;
  const T* scales;      // [rows, width / group]
  const int8_t* zeros;  // likewise
  size_t group;
  size_t groups() const { return width / group; }
  const int8_t* row(size_t r) const { return data + r * stride; }
};

template <class T>
struct GroupedColumns {  // the same, transposed: a row for each input channel, of which `group` in turn share scales
  const int8_t* data;
  size_t stride, width;
  const T* scales;      // [rows / group, width]
  const int8_t* zeros;  // likewise
  size_t group;
  const int8_t* row(size_t r) const { return data + r * stride; }
  float scale(size_t) const { return 1; }
};

inline float sum(const float* x, size_t count) {
  Lanes lanes = {};
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) lanes += load(x + i);
  float total = sum(lanes);
  for (; i < count; ++i) total += x[i];
  return total;
}

// `out[t]` = row r . x[t] for N rows x; meanwhile `next` comes out of the memory.
template <int N, class T>
inline void dots(const Grouped<T>& weight, size_t r, const float* const* x, const int8_t* next, float* out) {
  const size_t groups = weight.groups();
  const int8_t *row = weight.row(r), *zeros = weight.zeros + r * groups;
  const T* scales = weight.scales + r * groups;
  Lanes totals[N] = {};
  float rests[N] = {};
  for (size_t g = 0; g < groups; ++g) {
    const size_t begin = g * weight.group, end = begin + weight.group;
    size_t k = begin;
    Lanes even[N] = {}, odd[N] = {};
    for (; k + 2 * kLanes <= end; k += 2 * kLanes) {
      prefetch(next + k);
      const Lanes first = load(row + k), second = load(row + k + kLanes);
      for (int t = 0; t < N; ++t) {
        even[t] += first * load(x[t] + k);
        odd[t] += second * load(x[t] + k + kLanes);
      }
    }
    if (k + kLanes <= end) {
      const Lanes last = load(row + k);
      for (int t = 0; t < N; ++t) even[t] += last * load(x[t] + k);
      k += kLanes;
    }
    const float scale = widen(scales[g]);
    for (int t = 0; t < N; ++t) {
      totals[t] += (even[t] + odd[t]) * scale;
      float rest = zeros[g] ? -zeros[g] * sum(x[t] + begin, weight.group) : 0;  // most weights have none
      for (size_t i = k; i < end; ++i) rest += row[i] * x[t][i];
      rests[t] += rest * scale;
    }
  }
  for (int t = 0; t < N; ++t) out[t] = sum(totals[t]) + rests[t];
}

template <class T, class Take>
inline void products(const Grouped<T>& weight, size_t r, size_t next, const float* const* x, size_t count, Take take) {
  in_fours(count, take, [&](auto many, size_t first, float* out) {
    dots<decltype(many)::value>(weight, r, x + first, weight.row(next), out);
  });
}

// As for a Matrix: channels that follow each other in `list` and share their scales are added together.
template <class T>
void add_rows(const GroupedColumns<T>& down, const std::vector<uint32_t>& list, const float* z, float* y, size_t tokens,
              size_t from, size_t to) {
  std::vector<float> factors(tokens * kTogether), totals(tokens);
  const int8_t *rows[kTogether], *next[kTogether];
  for (size_t i = from, many = 0; i < to; i += many) {
    const size_t group = list[i] / down.group;
    for (many = 1; many < kTogether && i + many < to && list[i + many] / down.group == group;) ++many;
    for (size_t j = 0; j < kTogether; ++j) {  // what is missing is the last one again, times 0
      rows[j] = down.row(list[i + std::min(j, many - 1)]);
      next[j] = down.row(list[std::min(i + many + j, to - 1)]);
    }
    for (size_t t = 0; t < tokens; ++t) {
      totals[t] = 0;
      for (size_t j = 0; j < kTogether; ++j) {
        factors[t * kTogether + j] = j < many ? z[(i + j) * tokens + t] : 0;
        totals[t] += factors[t * kTogether + j];
      }
    }
    const T* scales = down.scales + group * down.width;
    const int8_t* zeros = down.zeros + group * down.width;
    size_t n = 0;
    for (; n + kLanes <= down.width; n += kLanes) {
      Lanes numbers[kTogether];
      for (size_t j = 0; j < kTogether; ++j) {
        if (n % kLine == 0) prefetch(next[j] + n);
        numbers[j] = load(rows[j] + n);
      }
      const Lanes scale = load(scales + n), zero = load(zeros + n);
      for (size_t t = 0; t < tokens; ++t) {
        const float* of = factors.data() + t * kTogether;
        Lanes even = zero * -totals[t], odd = {};
        for (size_t j = 0; j < kTogether; j += 2) {
          even += numbers[j] * of[j];
          odd += numbers[j + 1] * of[j + 1];
        }
        float* sums = y + t * down.width + n;
        store(load(sums) + (even + odd) * scale, sums);
      }
    }
    for (; n < down.width; ++n)
      for (size_t t = 0; t < tokens; ++t)
        for (size_t j = 0; j < many; ++j)
          y[t * down.width + n] += factors[t * kTogether + j] * (rows[j][n] - zeros[n]) * widen(scales[n]);
  }
}

}  // namespace kernels
