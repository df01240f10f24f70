// Products with quantized weights: codes of 4 or 8 bits with a scale for each block of 32 along a row, as onnxruntime's
// MatMulNBits holds them, or int8 rows with a scale for each output feature.
//
// Where the processor multiplies bytes (AVX-512 VNNI), numbers of x are rounded to 8 bits in the same blocks, and sums
// within a block are integers; elsewhere weights are widened and x stays as it is.
#pragma once

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define PP_FX_BYTES 1
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <vector>

#include "products.h"

namespace kernels {

constexpr size_t kBlock = 32;  // numbers that share a scale
constexpr int kSigned = 128;   // added to int8 numbers, which then are codes of 8 bits

// Rows of codes: two of 4 bits in a byte, the even one lower. A number is (code - zero) * scale.
struct Blocks {
  const uint8_t* codes;  // [rows, blocks, bits * 4]
  const float* scales;   // [rows, blocks]
  size_t blocks, bits;
  int zero() const { return 1 << (bits - 1); }
  size_t bytes() const { return bits * kBlock / 8; }  // of a block
  const uint8_t* row(size_t r) const { return codes + r * blocks * bytes(); }
};

// The 32 codes of a block, one in a byte.
inline void unpack(const uint8_t* from, size_t bits, uint8_t (&codes)[kBlock]) {
  if (bits == 8) {
    std::memcpy(codes, from, kBlock);
    return;
  }
#ifdef __AVX2__
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(both, low), odd = _mm_and_si128(_mm_srli_epi16(both, 4), low);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm_unpacklo_epi8(even, odd));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm_unpackhi_epi8(even, odd));
#else
  for (size_t i = 0; i < kBlock / 2; ++i) codes[2 * i] = from[i] & 15, codes[2 * i + 1] = from[i] >> 4;
#endif
}

// Rounds a block of up to 32 numbers to int8; the scale, which is not a number where one of them is not finite.
inline float round_block(const float* x, size_t many, int8_t* codes) {
  float wide[kBlock] = {};
  std::memcpy(wide, x, many * sizeof(float));
  float largest = 0;
  bool finite = true;
  for (const float number : wide) {
    const float size = std::fabs(number);
    finite &= size <= 3e38f;
    largest = size > largest ? size : largest;
  }
  const float scale = largest / 127, inverse = scale > 1e-38f ? 1 / scale : 0;
  for (size_t i = 0; i < kBlock; ++i)
    codes[i] = finite ? static_cast<int8_t>(static_cast<int32_t>(wide[i] * inverse + (wide[i] < 0 ? -.5f : .5f))) : 0;
  return finite ? scale : NAN;
}

#ifdef PP_FX_BYTES
// Rows of x, rounded.
class Rows {
 public:
  const size_t tokens, blocks;

  Rows(const float* x, size_t tokens, size_t depth)
      : tokens(tokens), blocks((depth + kBlock - 1) / kBlock), codes_(tokens * blocks * kBlock),
        scales_(tokens * blocks), sums_(tokens * blocks) {
    for (size_t t = 0; t < tokens; ++t)
      for (size_t b = 0; b < blocks; ++b) {
        const size_t place = t * blocks + b;
        int8_t* codes = codes_.data() + place * kBlock;
        scales_[place] = round_block(x + t * depth + b * kBlock, std::min(kBlock, depth - b * kBlock), codes);
        for (size_t i = 0; i < kBlock; ++i) sums_[place] += codes[i];
      }
  }
  const int8_t* codes(size_t t) const { return codes_.data() + t * blocks * kBlock; }
  const float* scales(size_t t) const { return scales_.data() + t * blocks; }
  const int32_t* sums(size_t t) const { return sums_.data() + t * blocks; }

 private:
  std::vector<int8_t> codes_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
};

// Sixteen output features of a weight side by side, as the products of bytes want them.
class Panel {
 public:
  static constexpr int kTokens = 8;  // that the registers hold the sums of

  explicit Panel(size_t blocks, int zero) : zero_(zero), codes_(blocks * kBlock * kLanes), scales_(blocks * kLanes) {}

  void set_scale(size_t block, size_t lane, float scale) { scales_[block * kLanes + lane] = scale; }
  // Number `k` to `k + 3` of sixteen features: four bytes of each.
  uint8_t* words(size_t k) { return codes_.data() + k * kLanes; }
  void filled() {}

  // out[t] = the products with rows first .. first + N - 1 of x.
  template <int N>
  void multiply(const Rows& x, size_t first, Lanes (&out)[N]) const {
    __m512 totals[N] = {};
    for (size_t b = 0; b < x.blocks; ++b) {
      __m512i sums[N];
      for (int t = 0; t < N; ++t) sums[t] = _mm512_set1_epi32(-zero_ * x.sums(first + t)[b]);
      for (size_t k = b * kBlock; k < (b + 1) * kBlock; k += 4) {
        const __m512i weights = _mm512_loadu_si512(codes_.data() + k * kLanes);
        for (int t = 0; t < N; ++t) {
          int32_t four;
          std::memcpy(&four, x.codes(first + t) + k, sizeof four);
          sums[t] = _mm512_dpbusd_epi32(sums[t], weights, _mm512_set1_epi32(four));
        }
      }
      const __m512 scales = _mm512_loadu_ps(scales_.data() + b * kLanes);
      for (int t = 0; t < N; ++t) {
        const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales(first + t)[b]));
        totals[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), scale, totals[t]);
      }
    }
    for (int t = 0; t < N; ++t) out[t] = reinterpret_cast<Lanes>(totals[t]);
  }

 private:
  int zero_;
  std::vector<uint8_t> codes_;  // [blocks * 8, 16, 4]
  std::vector<float> scales_;   // [blocks, 16]
};
#else
// Rows of x as they are, filled up to whole blocks.
class Rows {
 public:
  const size_t tokens, blocks;

  Rows(const float* x, size_t tokens, size_t depth)
      : tokens(tokens), blocks((depth + kBlock - 1) / kBlock), numbers_(tokens * blocks * kBlock) {
    for (size_t t = 0; t < tokens; ++t) std::copy_n(x + t * depth, depth, numbers_.data() + t * blocks * kBlock);
  }
  const float* numbers(size_t t) const { return numbers_.data() + t * blocks * kBlock; }

 private:
  std::vector<float> numbers_;
};

// Output features of a weight side by side, widened.
class Panel {
 public:
  static constexpr int kTokens = 4;

  explicit Panel(size_t blocks, int zero)
      : zero_(zero), codes_(blocks * kBlock * kLanes), scales_(blocks * kLanes), numbers_(blocks * kBlock * kLanes) {}

  void set_scale(size_t block, size_t lane, float scale) { scales_[block * kLanes + lane] = scale; }
  uint8_t* words(size_t k) { return codes_.data() + k * kLanes; }
  void filled() {
    for (size_t k = 0; k < numbers_.size() / kLanes; ++k)
      for (size_t lane = 0; lane < kLanes; ++lane)
        numbers_[k * kLanes + lane] =
            (codes_[(k / 4 * kLanes + lane) * 4 + k % 4] - zero_) * scales_[k / kBlock * kLanes + lane];
  }

  template <int N>
  void multiply(const Rows& x, size_t first, Lanes (&out)[N]) const {
    Lanes sums[N] = {};
    for (size_t k = 0; k < x.blocks * kBlock; ++k) {
      const Lanes weights = load(numbers_.data() + k * kLanes);
      for (int t = 0; t < N; ++t) sums[t] += weights * x.numbers(first + t)[k];
    }
    std::copy(sums, sums + N, out);
  }

 private:
  int zero_;
  std::vector<uint8_t> codes_;
  std::vector<float> scales_, numbers_;
};
#endif

// y [tokens, width] = the products of x with panels that `fill(panel, first, last)` makes of features first .. last - 1.
template <class Fill, class ParallelFor>
void multiply_panels(const Rows& x, int zero, float* y, size_t width, Fill fill, ParallelFor parallel_for) {
  constexpr int kTokens = Panel::kTokens;
  parallel_for((width + kLanes - 1) / kLanes, [&](size_t index) {
    const size_t first = index * kLanes, last = std::min(width, first + kLanes);
    Panel panel(x.blocks, zero);
    fill(panel, first, last);
    panel.filled();
    auto put = [&](size_t t, const Lanes& sums) { std::memcpy(y + t * width + first, &sums, (last - first) * sizeof(float)); };
    size_t t = 0;
    for (; t + kTokens <= x.tokens; t += kTokens) {
      Lanes sums[kTokens];
      panel.multiply<kTokens>(x, t, sums);
      for (int i = 0; i < kTokens; ++i) put(t + i, sums[i]);
    }
    for (; t < x.tokens; ++t) {
      Lanes sums[1];
      panel.multiply<1>(x, t, sums);
      put(t, sums[0]);
    }
  });
}

// x [tokens, depth] times the rows `kept` [width] of a weight -> y [tokens, width].
template <class ParallelFor>
void rows_linear(const float* x, Blocks weight, const int64_t* kept, float* y, size_t tokens, size_t depth, size_t width,
                 ParallelFor parallel_for) {
  auto fill = [&](Panel& panel, size_t first, size_t last) {
    for (size_t n = first; n < last; ++n) {
      const uint8_t* row = weight.row(kept[n]);
      for (size_t b = 0; b < weight.blocks; ++b) {
        uint8_t codes[kBlock];
        unpack(row + b * weight.bytes(), weight.bits, codes);
        for (size_t i = 0; i < kBlock; i += 4)
          std::memcpy(panel.words(b * kBlock + i) + (n - first) * 4, codes + i, 4);
        panel.set_scale(b, n - first, weight.scales[kept[n] * weight.blocks + b]);
      }
    }
  };
  multiply_panels(Rows(x, tokens, depth), weight.zero(), y, width, fill, parallel_for);
}

// x [tokens, channels] times an int8 weight [channels, width] with a scale for each of its columns -> y [tokens, width].
template <class ParallelFor>
void output_linear(const float* x, const int8_t* weight, const float* scales, float* y, size_t tokens, size_t channels,
                   size_t width, ParallelFor parallel_for) {
  const Rows rows(x, tokens, channels);
  auto fill = [&](Panel& panel, size_t first, size_t last) {
    for (size_t k = 0; k < channels; k += 4) {
      uint8_t four[4][kLanes] = {};
      for (size_t j = 0; j < std::min<size_t>(4, channels - k); ++j)
        std::memcpy(four[j], weight + (k + j) * width + first, last - first);
      uint32_t words[kLanes];
      for (size_t lane = 0; lane < kLanes; ++lane)
        words[lane] = (four[0][lane] | four[1][lane] << 8 | four[2][lane] << 16 | uint32_t{four[3][lane]} << 24) ^ 0x80808080;
      std::memcpy(panel.words(k), words, sizeof words);
    }
    for (size_t b = 0; b < rows.blocks; ++b)
      for (size_t n = first; n < last; ++n) panel.set_scale(b, n - first, scales[n]);
  };
  multiply_panels(rows, kSigned, y, width, fill, parallel_for);
}

// Products of single rows of codes with few rows of x.
#ifdef PP_FX_BYTES
class RowDots {
 public:
  RowDots(const float* x, size_t tokens, size_t depth, Blocks weight)
      : weight_(weight), pairs_((weight.blocks + 1) / 2), codes_(tokens * pairs_ * 64), scales_(tokens * pairs_ * kLanes),
        starts_(tokens * pairs_ * kLanes) {
    const Rows rows(x, tokens, depth);
    for (size_t t = 0; t < tokens; ++t)
      for (size_t b = 0; b < rows.blocks; ++b) {
        const size_t place = t * pairs_ + b / 2;
        for (size_t i = 0; i < kBlock; ++i) codes_[place * 64 + position(b % 2, i)] = rows.codes(t)[b * kBlock + i];
        for (size_t lane = 0; lane < kLanes; ++lane)
          if (block_of(lane) == b % 2) scales_[place * kLanes + lane] = rows.scales(t)[b];
        starts_[place * kLanes + position(b % 2, 0) / 4] = -weight.zero() * rows.sums(t)[b];
      }
    for (size_t lane = 0; lane < kLanes; ++lane) block_of_lane_[lane] = static_cast<int32_t>(block_of(lane));
  }

  // weight row r . x[t]; `next` is a row that will be read soon.
  float operator()(size_t r, size_t t, size_t next) const {
    const char* scales = reinterpret_cast<const char*>(weight_.scales + next * weight_.blocks);
    for (size_t i = 0; i < weight_.blocks * sizeof(float); i += 64) __builtin_prefetch(scales + i, 0, 2);
    return weight_.bits == 8 ? dot<8>(r, t, weight_.row(next)) : dot<4>(r, t, weight_.row(next));
  }

 private:
  template <int Bits>
  float dot(size_t r, size_t t, const uint8_t* next) const {
    constexpr size_t kStep = Bits * 2 * kBlock / 8;
    const uint8_t* codes = weight_.row(r);
    const float* scales = weight_.scales + r * weight_.blocks;
    const __m512i lanes = _mm512_loadu_si512(block_of_lane_);
    const size_t whole = weight_.blocks / 2;
    __m512 total = _mm512_setzero_ps();
    for (size_t p = 0; p < whole; ++p) {
      __builtin_prefetch(next + p * kStep, 0, 2);
      const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + 2 * p));
      const __m512 of_weight = _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_castsi128_ps(pair)));
      add_pair(spread<Bits>(codes + p * kStep), of_weight, t * pairs_ + p, total);
    }
    if (whole < pairs_) {  // a single block is left
      uint8_t last[kStep] = {};
      std::memcpy(last, codes + whole * kStep, kStep / 2);
      add_pair(spread<Bits>(last), _mm512_set1_ps(scales[2 * whole]), t * pairs_ + whole, total);
    }
    return sum(reinterpret_cast<Lanes>(total));
  }
  void add_pair(__m512i codes, __m512 of_weight, size_t place, __m512& total) const {
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_loadu_si512(starts_.data() + place * kLanes), codes,
                                             _mm512_loadu_si512(codes_.data() + place * 64));
    const __m512 scale = _mm512_mul_ps(of_weight, _mm512_loadu_ps(scales_.data() + place * kLanes));
    total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, total);
  }
  // The codes of two blocks, one in a byte: of 4 bits the lower ones of both first.
  template <int Bits>
  static __m512i spread(const uint8_t* codes) {
    if (Bits == 8) return _mm512_loadu_si512(codes);
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), low = _mm256_set1_epi8(15);
    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(both, low)), upper, 1);
  }
  size_t position(size_t block, size_t i) const {
    return weight_.bits == 8 ? block * kBlock + i : i % 2 * kBlock + block * (kBlock / 2) + i / 2;
  }
  size_t block_of(size_t lane) const { return weight_.bits == 8 ? lane / 8 : lane % 8 / 4; }

  Blocks weight_;
  size_t pairs_;
  std::vector<int8_t> codes_;    // [tokens, pairs, 64]
  std::vector<float> scales_;    // [tokens, pairs, 16]
  std::vector<int32_t> starts_;  // [tokens, pairs, 16]: what the codes' zeros add, taken off
  int32_t block_of_lane_[kLanes];
};
#else
class RowDots {
 public:
  RowDots(const float* x, size_t tokens, size_t depth, Blocks weight) : weight_(weight), rows_(x, tokens, depth) {}

  float operator()(size_t r, size_t t, size_t) const {
    Lanes total = {};
    for (size_t b = 0; b < weight_.blocks; ++b) {
      uint8_t codes[kBlock];
      int8_t numbers[kBlock];
      unpack(weight_.row(r) + b * weight_.bytes(), weight_.bits, codes);
      for (size_t i = 0; i < kBlock; ++i) numbers[i] = static_cast<int8_t>(codes[i] - weight_.zero());
      Lanes part = {};
      for (size_t i = 0; i < kBlock; i += kLanes) part += load(numbers + i) * load(rows_.numbers(t) + b * kBlock + i);
      total += part * weight_.scales[r * weight_.blocks + b];
    }
    return sum(total);
  }

 private:
  Blocks weight_;
  Rows rows_;
};
#endif

}  // namespace kernels
