// An MLP of few tokens over each token's strongest channels; pp_fx/kernels/strongest.py says what is computed.
//
// Weights are read where they lie: one row of each projection for a channel, and only if a token has chosen it.
// `parallel_for(tasks, task)` calls task(0) .. task(tasks - 1), at once or in turn.
#pragma once

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#include <type_traits>
#include <vector>

#include "bfloat16.h"
#include "products.h"
#include "quantized.h"

namespace kernels {

constexpr size_t kAhead = 8;    // rows between the one that is multiplied and the one that is asked of the memory
constexpr size_t kTogether = 8; // rows of the output projection that are added at a time
constexpr size_t kLine = 64;    // bytes

template <class T>
struct Matrix {  // rows of `width` numbers, `stride` apart
  const T* data;
  size_t stride, width;
  const float* scales = nullptr;  // of rounded numbers: one for each output feature
  const T* row(size_t r) const { return data + r * stride; }
  float scale(size_t feature) const { return scales ? scales[feature] : 1; }
};

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// out[t] = w . x[t] for N rows x; meanwhile `next` comes out of the memory.
template <int N, class T>
inline void dots(const T* w, const float* const* x, size_t depth, const T* next, float* out) {
  constexpr int kChains = (N == 1 ? 64 : 16) / kLanes;  // of additions, for each row
  constexpr size_t kStep = kChains * kLanes;
  Lanes sums[N][kChains] = {};
  size_t k = 0;
  for (; k + kStep <= depth; k += kStep) {
    for (size_t i = 0; i < kStep; i += kLine / sizeof(T)) prefetch(next + k + i);
    for (int a = 0; a < kChains; ++a) {
      const Lanes weight = load(w + k + a * kLanes);
      for (int t = 0; t < N; ++t) sums[t][a] += weight * load(x[t] + k + a * kLanes);
    }
  }
  for (int t = 0; t < N; ++t) {
    for (int a = 1; a < kChains; ++a) sums[t][0] += sums[t][a];
    float total = sum(sums[t][0]);
    for (size_t rest = k; rest < depth; ++rest) total += widen(w[rest]) * x[t][rest];
    out[t] = total;
  }
}

// `run(N, t, out)` makes N results from row t on, 4, 2 or 1 at a time; `take(t, result)` receives all of the `count`.
template <class Take, class Run>
inline void in_fours(size_t count, Take take, Run run) {
  float out[4];
  for (size_t t = 0; t < count;) {
    const size_t left = count - t, taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (taken == 4) run(std::integral_constant<int, 4>{}, t, out);
    if (taken == 2) run(std::integral_constant<int, 2>{}, t, out);
    if (taken == 1) run(std::integral_constant<int, 1>{}, t, out);
    for (size_t i = 0; i < taken; ++i) take(t + i, out[i]);
    t += taken;
  }
}

// `take(t, row r . x[t])` for all of the `count` rows x; meanwhile row `next` comes out of the memory.
template <class W, class Take>
inline void products(Matrix<W> weight, size_t r, size_t next, const float* const* x, size_t count, Take take) {
  const float scale = weight.scale(r);
  in_fours(count, [&](size_t t, float total) { take(t, total * scale); }, [&](auto many, size_t t, float* out) {
    dots<decltype(many)::value>(weight.row(r), x + t, weight.width, weight.row(next), out);
  });
}

template <class T>
std::vector<float> floats(const T* x, size_t count) {
  std::vector<float> wide(count);
  for (size_t i = 0; i < count; ++i) wide[i] = widen(x[i]);
  return wide;
}

// x weight^T + bias: x [tokens, depth], weight [rows, depth] -> y [tokens, rows].
template <class T, class Weight, class ParallelFor>
void linear(Weight weight, const T* bias, const T* x, T* y, size_t tokens, size_t rows, size_t tasks,
            ParallelFor parallel_for) {
  const size_t depth = weight.width;
#ifdef PP_FX_PAIRS
  if constexpr (std::is_same_v<Weight, Matrix<BFloat16>>) {
    if (tokens > 1) {  // a single row waits for the memory, which the code below reads as one stream
      return parallel_for(tasks, [&](size_t task) {
        pair_products([&](size_t r) { return weight.row(r); }, x, tokens, depth, rows * task / tasks,
                      rows * (task + 1) / tasks, [&](size_t t, size_t r, float sum) {
                        narrow(sum + (bias ? widen(bias[r]) : 0), y[t * rows + r]);
                      });
      });
    }
  }
#endif
  const std::vector<float> wide = floats(x, tokens * depth);
  std::vector<const float*> of(tokens);
  for (size_t t = 0; t < tokens; ++t) of[t] = wide.data() + t * depth;
  parallel_for(tasks, [&](size_t task) {
    const size_t end = rows * (task + 1) / tasks;
    for (size_t r = rows * task / tasks; r < end; ++r) {
      const float add = bias ? widen(bias[r]) : 0;
      products(weight, r, std::min(r + kAhead, end - 1), of.data(), tokens,
               [&](size_t t, float total) { narrow(total + add, y[t * rows + r]); });
    }
  });
}

constexpr size_t kGroup = 64;  // features that share a scale

typedef int32_t Words __attribute__((vector_size(kLanes * sizeof(int32_t))));

// Sums of code * x over a group, spread over the lanes. Codes are int8 as they are, or of 4 bits in pairs, features i and
// i + 32 of the group in byte i, each 8 too large.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
inline Words group_sums(const int8_t* codes, const int8_t* x, int32_t sum_of_x) {
  const __m512i raised = _mm512_xor_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(-128));  // 128 too large
  Words sums = reinterpret_cast<Words>(_mm512_dpbusd_epi32(_mm512_setzero_si512(), raised, _mm512_loadu_si512(x)));
  sums[0] -= 128 * sum_of_x;
  return sums;
}
inline Words group_sums(const uint8_t* codes, const int8_t* x, int32_t sum_of_x) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), low = _mm256_set1_epi8(15);
  const __m256i first = _mm256_and_si256(pairs, low), second = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low);
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  Words sums = reinterpret_cast<Words>(_mm512_dpbusd_epi32(_mm512_setzero_si512(), both, _mm512_loadu_si512(x)));
  sums[0] -= 8 * sum_of_x;
  return sums;
}
#else
inline Words group_sums(const int8_t* codes, const int8_t* x, int32_t) {
  int32_t sum = 0;
  for (size_t i = 0; i < kGroup; ++i) sum += codes[i] * x[i];
  return Words{sum};
}
inline Words group_sums(const uint8_t* codes, const int8_t* x, int32_t sum_of_x) {
  int32_t sum = -8 * sum_of_x;
  for (size_t i = 0; i < kGroup / 2; ++i) sum += (codes[i] & 15) * x[i] + (codes[i] >> 4) * x[i + kGroup / 2];
  return Words{sum};
}
#endif

// Rows of x as int8, with a scale for each group: products with codes are then integers.
struct Rounded {
  std::vector<int8_t> codes;   // [tokens, groups * 64]
  std::vector<float> scales;   // [tokens, groups]
  std::vector<int32_t> sums;   // of the codes, [tokens, groups]
};

template <class T>
Rounded rounded(const T* x, size_t tokens, size_t depth, size_t groups) {
  Rounded made{std::vector<int8_t>(tokens * groups * kGroup), std::vector<float>(tokens * groups),
               std::vector<int32_t>(tokens * groups)};
  for (size_t t = 0; t < tokens; ++t)
    for (size_t g = 0; g < groups; ++g) {
      const T* part = x + t * depth + g * kGroup;
      const size_t many = std::min(kGroup, depth - g * kGroup);
      float largest = 0;
      for (size_t i = 0; i < many; ++i) largest = std::max(largest, std::fabs(widen(part[i])));
      if (!(largest > 0) || !std::isfinite(largest)) continue;
      const size_t place = t * groups + g;
      made.scales[place] = largest / 127;
      for (size_t i = 0; i < many; ++i) {
        const float number = widen(part[i]) / made.scales[place];
        const int8_t code = std::isnan(number) ? 0 : static_cast<int8_t>(std::lrint(number));
        made.codes[place * kGroup + i] = code;
        made.sums[place] += code;
      }
    }
  return made;
}

// x weight^T -> y fp32 [tokens, rows]: x [tokens, depth], weight as codes [rows, groups] with scales [rows, groups].
template <class Code, class T, class ParallelFor>
void coded_linear(const Code* codes, const BFloat16* scales, const T* x, float* y, size_t tokens, size_t rows,
                  size_t depth, size_t tasks, ParallelFor parallel_for) {
  const size_t groups = (depth + kGroup - 1) / kGroup;
  const size_t width = kGroup / (std::is_same<Code, int8_t>::value ? 1 : 2);
  const Rounded given = rounded(x, tokens, depth, groups);
  parallel_for(tasks, [&](size_t task) {
    const size_t end = rows * (task + 1) / tasks;
    for (size_t r = rows * task / tasks; r < end; ++r)
      for (size_t t = 0; t < tokens; ++t) {
        Lanes total = {};
        for (size_t g = 0; g < groups; ++g) {
          const size_t place = t * groups + g;
          const Words sums =
              group_sums(codes + (r * groups + g) * width, given.codes.data() + place * kGroup, given.sums[place]);
          total += __builtin_convertvector(sums, Lanes) * (given.scales[place] * widen(scales[r * groups + g]));
        }
        y[t * rows + r] = sum(total);
      }
  });
}

// Bits of |x|: they are ordered as the numbers are, NaN above all.
inline uint32_t magnitude(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

// The `count`-th largest of n sizes: by their upper bits, then among those that share these.
inline uint32_t largest(const uint32_t* sizes, size_t n, size_t count) {
  constexpr uint32_t kBins = 1 << 11;
  std::vector<uint32_t> left(n);
  uint32_t found = 0;
  for (const int shift : {20, 9, 0}) {
    uint32_t with[2][kBins] = {};  // two, since many in a row fall into one bin
    const uint32_t last = shift ? kBins - 1 : (1 << 9) - 1;
    for (size_t i = 0; i < n; ++i) ++with[i & 1][sizes[i] >> shift & last];
    uint32_t bin = last;
    for (size_t many; bin && (many = with[0][bin] + with[1][bin]) < count; --bin) count -= many;
    found |= bin << shift;
    size_t kept = 0;
    for (size_t i = 0; i < n; ++i) {  // without a branch: no processor foresees it
      const uint32_t size = sizes[i];
      left[kept] = size;
      kept += (size >> shift & last) == bin;
    }
    sizes = left.data();
    n = kept;
  }
  return found;
}

struct Chosen {
  std::vector<uint32_t> channels;  // that a token has chosen, ascending
  std::vector<uint32_t> begins;    // of each channel's tokens in `tokens`; one more for the end
  std::vector<uint32_t> tokens;
};

// Every token's channels that are at least as strong as its `count`-th strongest; those without strength add nothing.
inline Chosen choose(const float* strength, size_t tokens, size_t channels, size_t count) {
  std::vector<uint32_t> sizes(tokens * channels), least(tokens);
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = magnitude(strength[i]);
  for (size_t t = 0; t < tokens; ++t)
    least[t] = std::max<uint32_t>(largest(sizes.data() + t * channels, channels, count), 1);
  Chosen chosen = {std::vector<uint32_t>(channels + 1), std::vector<uint32_t>(channels + 1),
                   std::vector<uint32_t>(tokens * channels + 1)};
  size_t some = 0, all = 0;  // likewise without a branch
  for (size_t c = 0; c < channels; ++c) {
    chosen.channels[some] = c;
    chosen.begins[some] = all;
    const size_t before = all;
    for (size_t t = 0; t < tokens; ++t) {
      chosen.tokens[all] = t;
      all += sizes[t * channels + c] >= least[t];
    }
    some += all != before;
  }
  chosen.begins[some] = all;
  chosen.channels.resize(some);
  chosen.begins.resize(some + 1);
  chosen.tokens.resize(all);
  return chosen;
}

// y[t] += sum over i in [from, to) of z[i * tokens + t] * the row of channel list[i].
template <class T>
void add_rows(Matrix<T> down, const std::vector<uint32_t>& list, const float* z, float* y, size_t tokens, size_t from,
              size_t to) {
  const T *rows[kTogether], *next[kTogether];
  for (size_t i = from; i < to; i += kTogether) {
    const size_t many = std::min(kTogether, to - i);
    for (size_t j = 0; j < kTogether; ++j) {
      rows[j] = down.row(list[std::min(i + j, to - 1)]);
      next[j] = down.row(list[std::min(i + kTogether + j, to - 1)]);
    }
    constexpr size_t kStep = 2 * kLanes;
    size_t n = 0;
    for (; many == kTogether && n + kStep <= down.width; n += kStep) {
      Lanes weights[kTogether][2];
      for (size_t j = 0; j < kTogether; ++j) {
        for (size_t p = 0; p < kStep; p += kLine / sizeof(T)) prefetch(next[j] + n + p);
        for (size_t h = 0; h < 2; ++h) weights[j][h] = load(rows[j] + n + h * kLanes);
      }
      for (size_t t = 0; t < tokens; ++t) {
        float* sums = y + t * down.width + n;
        Lanes low = load(sums), high = load(sums + kLanes);
        for (size_t j = 0; j < kTogether; ++j) {
          low += weights[j][0] * z[(i + j) * tokens + t];
          high += weights[j][1] * z[(i + j) * tokens + t];
        }
        store(low, sums);
        store(high, sums + kLanes);
      }
    }
    for (; n < down.width; ++n)
      for (size_t t = 0; t < tokens; ++t)
        for (size_t j = 0; j < many; ++j) y[t * down.width + n] += z[(i + j) * tokens + t] * widen(rows[j][n]);
  }
}

// y [tokens, channels] = x . weight_c + bias_c for a token's chosen channels, 0 for the others.
template <class T, class Weight, class ParallelFor>
void chosen_linear(const float* strength, Weight weight, const T* bias, const T* x, T* y, size_t tokens,
                   size_t channels, size_t count, size_t tasks, ParallelFor parallel_for) {
  const Chosen chosen = choose(strength, tokens, channels, count);
  const size_t total = chosen.channels.size();
  const std::vector<float> wide = floats(x, tokens * weight.width);
  std::memset(static_cast<void*>(y), 0, tokens * channels * sizeof(T));
  parallel_for(tasks, [&](size_t task) {
    const size_t to = total * (task + 1) / tasks;
    std::vector<const float*> rows(tokens);
    for (size_t i = total * task / tasks; i < to; ++i) {
      const size_t c = chosen.channels[i], begin = chosen.begins[i], many = chosen.begins[i + 1] - begin;
      const uint32_t* of = chosen.tokens.data() + begin;
      for (size_t j = 0; j < many; ++j) rows[j] = wide.data() + of[j] * weight.width;
      const float add = bias ? widen(bias[c]) : 0;
      products(weight, c, chosen.channels[std::min(i + kAhead, to - 1)], rows.data(), many,
               [&](size_t j, float product) { narrow(product + add, y[of[j] * channels + c]); });
    }
  });
}

// y [tokens, out] = sum over a token's chosen channels c of z_c * down_c, plus down_bias.
//
// `fill(z, chosen, from, to)` computes z of the chosen channels from .. to - 1: z[i * tokens + t], where a token chose it.
template <class T, class Down, class Fill, class ParallelFor>
void sum_of_chosen(const Chosen& chosen, Down down, const T* down_bias, T* y, size_t tokens, size_t tasks, Fill fill,
                   ParallelFor parallel_for) {
  const size_t total = chosen.channels.size(), numbers = tokens * down.width;
  std::vector<float> z(total * tokens), parts(tasks * numbers);
  parallel_for(tasks, [&](size_t task) {
    const size_t from = total * task / tasks, to = total * (task + 1) / tasks;
    fill(z.data(), from, to);
    add_rows(down, chosen.channels, z.data(), parts.data() + task * numbers, tokens, from, to);
  });
  for (size_t i = 0; i < numbers; ++i) {
    float result = 0;
    for (size_t task = 0; task < tasks; ++task) result += parts[task * numbers + i];
    const size_t feature = i % down.width;
    narrow(result * down.scale(feature) + (down_bias ? widen(down_bias[feature]) : 0), y[i]);
  }
}

// As if every token had chosen every channel.
inline Chosen every(size_t tokens, size_t channels) {
  Chosen chosen = {std::vector<uint32_t>(channels), std::vector<uint32_t>(channels + 1),
                   std::vector<uint32_t>(tokens * channels)};
  for (size_t c = 0; c < channels; ++c) chosen.channels[c] = c, chosen.begins[c + 1] = (c + 1) * tokens;
  for (size_t i = 0; i < chosen.tokens.size(); ++i) chosen.tokens[i] = i % tokens;
  return chosen;
}

// z of the chosen channels where the factor alone is the output projection's input.
template <class T>
auto factors(const Chosen& chosen, const T* factor, size_t tokens, size_t channels) {
  return [&chosen, factor, tokens, channels](float* z, size_t from, size_t to) {
    for (size_t i = from; i < to; ++i)
      for (uint32_t j = chosen.begins[i]; j < chosen.begins[i + 1]; ++j)
        z[i * tokens + chosen.tokens[j]] = widen(factor[chosen.tokens[j] * channels + chosen.channels[i]]);
  };
}

// y [tokens, out] = sum over a token's chosen channels c of factor_c * (x . up_c + bias_c) * down_c, plus down_bias;
// without `up.data` the factor alone.
template <class T, class Up, class Down, class ParallelFor>
void strongest(const float* strength, const T* factor, const T* x, Up up, const T* up_bias, Down down, const T* down_bias,
               T* y, size_t tokens, size_t channels, size_t count, size_t tasks, ParallelFor parallel_for) {
  const Chosen chosen = choose(strength, tokens, channels, count);
  if (!up.data)
    return sum_of_chosen(chosen, down, down_bias, y, tokens, tasks, factors(chosen, factor, tokens, channels), parallel_for);
  const std::vector<float> wide = floats(x, tokens * up.width);
  auto fill = [&](float* z, size_t from, size_t to) {
    std::vector<const float*> rows(tokens);
    for (size_t i = from; i < to; ++i) {
      const size_t c = chosen.channels[i], begin = chosen.begins[i], many = chosen.begins[i + 1] - begin;
      const uint32_t* of = chosen.tokens.data() + begin;
      for (size_t j = 0; j < many; ++j) rows[j] = wide.data() + of[j] * up.width;
      const float add = up_bias ? widen(up_bias[c]) : 0;
      const size_t next = chosen.channels[std::min(i + kAhead, to - 1)];
      products(up, c, next, rows.data(), many, [&](size_t j, float product) {
        T rounded, made;  // where the model rounds
        narrow(product + add, rounded);
        narrow(widen(rounded) * widen(factor[of[j] * channels + c]), made);
        z[i * tokens + of[j]] = widen(made);
      });
    }
  };
  sum_of_chosen(chosen, down, down_bias, y, tokens, tasks, fill, parallel_for);
}

// As `strongest`, with quantized weights: rows of codes and int8 rows of the output projection.
template <class ParallelFor>
void quantized_strongest(const float* strength, const float* factor, const float* x, Blocks up, const float* up_bias,
                       Matrix<int8_t> down, float* y, size_t tokens, size_t channels, size_t depth, size_t count,
                       size_t tasks, ParallelFor parallel_for) {
  const Chosen chosen = choose(strength, tokens, channels, count);
  const float* no_bias = nullptr;
  if (!up.codes)
    return sum_of_chosen(chosen, down, no_bias, y, tokens, tasks, factors(chosen, factor, tokens, channels), parallel_for);
  const RowDots dot(x, tokens, depth, up);
  auto fill = [&](float* z, size_t from, size_t to) {
    for (size_t i = from; i < to; ++i) {
      const size_t c = chosen.channels[i], next = chosen.channels[std::min(i + kAhead, to - 1)];
      for (uint32_t j = chosen.begins[i]; j < chosen.begins[i + 1]; ++j) {
        const size_t t = chosen.tokens[j];
        z[i * tokens + t] = factor[t * channels + c] * (dot(c, t, next) + (up_bias ? up_bias[c] : 0));
      }
    }
  };
  sum_of_chosen(chosen, down, no_bias, y, tokens, tasks, fill, parallel_for);
}

}  // namespace kernels
