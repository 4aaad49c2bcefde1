// AVX-512: two panels and many tokens, expanded into cache.
#pragma once

#include "avx512_decode.h"
#include "avx512_pack.h"

namespace {

constexpr int64_t kCacheColumns = 1024;  // two expanded panels: 64 KB of bf16

template <class Dot, int T>
void float_tile(const uint8_t* w0, const uint8_t* w1, int64_t words, const typename Dot::X* x,
                float* c) {
  __m512 a[T], b[T];
  unroll<T>([&](auto t) LAMBDA {
    a[t] = _mm512_loadu_ps(c + 32 * t);
    b[t] = _mm512_loadu_ps(c + 32 * t + 16);
  });
  for (int64_t w = 0; w < words; w++, x += T * Dot::kPerWord) {
    const __m512i word0 = load512(w0 + kLine * w), word1 = load512(w1 + kLine * w);
    unroll<T>([&](auto t) LAMBDA {
      a[t] = Dot::template add<T>(x, 0, t, word0, a[t]);
      b[t] = Dot::template add<T>(x, 0, t, word1, b[t]);
    });
  }
  unroll<T>([&](auto t) LAMBDA {
    _mm512_storeu_ps(c + 32 * t, a[t]);
    _mm512_storeu_ps(c + 32 * t + 16, b[t]);
  });
}

template <int Shift, int T>
void integer_tile(const uint8_t* w0, const uint8_t* w1, int64_t words, const uint32_t* x, float* c,
                  const Rounding* groups, const uint8_t* scales0, const uint8_t* scales1) {
  Ints a[T], b[T];
  unroll<T>([&](auto t) LAMBDA { a[t] = b[t] = broadcast_int(-groups[t].excess); });
  for (int64_t w = 0; w < words; w++, x += T) {
    const __m512i word0 = load512(w0 + kLine * w), word1 = load512(w1 + kLine * w);
    unroll<T>([&](auto t) LAMBDA {
      const __m512i quad = _mm512_set1_epi32(static_cast<int>(x[t]));
      a[t] = multiply_int8(quad, word0, a[t]);
      b[t] = multiply_int8(quad, word1, b[t]);
    });
  }
  const __m512 s0 = group_scales<Shift>(scales0), s1 = group_scales<Shift>(scales1);
  unroll<T>([&](auto t) LAMBDA {
    const __m512 s = _mm512_set1_ps(groups[t].scale);
    float* sum = c + 32 * t;
    const __m512 exact0 = _mm512_cvtepi32_ps((__m512i)a[t]);
    const __m512 exact1 = _mm512_cvtepi32_ps((__m512i)b[t]);
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(exact0, _mm512_mul_ps(s0, s), _mm512_loadu_ps(sum)));
    _mm512_storeu_ps(sum + 16,
                     _mm512_fmadd_ps(exact1, _mm512_mul_ps(s1, s), _mm512_loadu_ps(sum + 16)));
  });
}

template <class Dot>
constexpr decltype(&float_tile<Dot, 1>) kFloatTiles[] = {
    float_tile<Dot, 1>, float_tile<Dot, 2>,  float_tile<Dot, 3>,  float_tile<Dot, 4>,
    float_tile<Dot, 5>, float_tile<Dot, 6>,  float_tile<Dot, 7>,  float_tile<Dot, 8>,
    float_tile<Dot, 9>, float_tile<Dot, 10>, float_tile<Dot, 11>, float_tile<Dot, 12>};
template <int S>
constexpr decltype(&integer_tile<S, 1>) kIntegerTiles[] = {
    integer_tile<S, 1>, integer_tile<S, 2>,  integer_tile<S, 3>,  integer_tile<S, 4>,
    integer_tile<S, 5>, integer_tile<S, 6>,  integer_tile<S, 7>,  integer_tile<S, 8>,
    integer_tile<S, 9>, integer_tile<S, 10>, integer_tile<S, 11>, integer_tile<S, 12>};

constexpr int64_t kCacheBytes = kCacheColumns * kRows * 2;  // of one expanded panel

// Where the sums of a pair of panels are kept: [tokens][2 * 16 rows].
struct Scratch {
  uint8_t* cache[2];
  float* sums;

  Scratch(void* memory, int64_t tokens) {
    cache[0] = static_cast<uint8_t*>(memory);
    cache[1] = cache[0] + kCacheBytes;
    sums = reinterpret_cast<float*>(cache[1] + kCacheBytes);
    std::memset(sums, 0, static_cast<size_t>(tokens) * 2 * kRows * sizeof(float));
  }
};

template <class Reader, class Dot>
bool float_pair(const Panels& p, const Activations& x, Scratch& s, const uint8_t* (&at)[2]) {
  const int64_t width = tile_width(x.tokens);
  for (int64_t block = 0; block < p.blocks; block += kCacheColumns / kColumns) {
    const int64_t blocks = smaller(kCacheColumns / kColumns, p.blocks - block);
    Words w[2];
    for (int i = 0; i < 2; i++) {
      w[i] = expand<Reader>(p, at[i], blocks, s.cache[i]);
      at[i] = w[i].next;
      if (at[i] == nullptr) return false;
    }
    for (int64_t t = 0; t < x.tokens; t += width) {
      const int64_t n = smaller(width, x.tokens - t);
      const auto* tile = static_cast<const typename Dot::X*>(x.packed) +
                         Reader::kWords * Dot::kPerWord * (t * p.blocks + block * n);
      kFloatTiles<Dot>[n - 1](w[0].first, w[1].first, blocks * Reader::kWords, tile,
                              s.sums + t * 2 * kRows);
    }
  }
  return true;
}

template <class Reader>
bool integer_pair(const Panels& p, const Activations& x, Scratch& s, const uint8_t* (&at)[2]) {
  const uint8_t* line[2] = {};
  const int64_t width = tile_width(x.tokens);
  const int64_t blocks = p.group / kColumns, groups = p.blocks / blocks;
  const int64_t together = larger<int64_t>(1, kCacheColumns * 2 / p.group);
  for (int64_t g = 0; g < groups; g += together) {
    const int64_t count = smaller(together, groups - g);
    const uint8_t *lines[2][kCacheColumns * 2 / kColumns], *words[2][kCacheColumns * 2 / kColumns];
    for (int i = 0; i < 2; i++) {
      uint8_t* cache = s.cache[i];
      for (int64_t j = 0; j < count; j++, cache += p.group * kRows) {
        if (!p.open_group(g + j, &at[i], &line[i])) return false;
        lines[i][j] = line[i];
        const Words w = expand<Reader>(p, at[i], blocks, cache);
        words[i][j] = w.first;
        at[i] = w.next;
        if (at[i] == nullptr) return false;
      }
    }
    for (int64_t t = 0; t < x.tokens; t += width) {
      const int64_t n = smaller(width, x.tokens - t);
      for (int64_t j = 0; j < count; j++) {
        const uint32_t* tile = static_cast<const uint32_t*>(x.packed) +
                               Reader::kWords * (t * p.blocks + (g + j) * blocks * n);
        kIntegerTiles<Reader::kShift>[n - 1](
            words[0][j], words[1][j], blocks * Reader::kWords, tile, s.sums + t * 2 * kRows,
            x.groups + t * groups + (g + j) * n, lines[0][j], lines[1][j]);
      }
    }
  }
  return true;
}

template <class Reader, class Dot>
bool pairs(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
           void* memory) {
  for (int64_t panel = first; panel < last; panel += 2) {
    Scratch s(memory, x.tokens);
    const int64_t pair[2] = {panel, smaller(panel + 1, p.count - 1)};
    const uint8_t* at[2] = {p.begin(pair[0]), p.begin(pair[1])};
    bool good;
    if constexpr (Reader::kWords == 16)
      good = float_pair<Reader, Dot>(p, x, s, at);
    else
      good = integer_pair<Reader>(p, x, s, at);
    for (int i = 0; i < 2; i++) good = good && p.ends(pair[i], at[i]);
    if (!good) return false;
    for (int64_t t = 0; t < x.tokens; t++)
      for (int i = 0; i < 1 + (pair[1] != pair[0]); i++)
        store_rows(p, pair[i], _mm512_loadu_ps(s.sums + t * 2 * kRows + i * kRows), y.from(t, p));
  }
  return true;
}

}  // namespace
