// AVX-512: one panel and up to 16 tokens, expanded in registers.
#pragma once

#include "avx512_expand.h"

namespace {

template <int M>
constexpr int kChains = M <= 2   ? 4
                        : M <= 4 ? 2
                                 : 1;  // independent sums hide the latency

// Sum += two columns of weights times activations [words][M] of bf16 pairs.
struct PairDot {
  using X = uint32_t;
  static constexpr int kPerWord = 1;
  template <int M>
  static INLINE __m512 add(const X* x, int64_t word, int token, __m512i weights, __m512 sum) {
    return broadcast_bf16(x + word * M + token, weights, sum);
  }
};

// The same of float32 [columns][M].
struct WideDot {
  using X = float;
  static constexpr int kPerWord = 2;
  template <int M>
  static INLINE __m512 add(const X* x, int64_t word, int token, __m512i weights, __m512 sum) {
    const __m512i odd = _mm512_and_si512(weights, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
    const __m512i even = _mm512_slli_epi32(weights, 16);
    x += word * 2 * M + token;
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(even), _mm512_set1_ps(x[0]), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(odd), _mm512_set1_ps(x[M]), sum);
  }
};

template <class Reader, class Dot, int M, bool Ask>
INLINE const uint8_t* float_panel(const Panels& p, const uint8_t* at, const typename Dot::X* x,
                                  __m512 (&out)[M]) {
  constexpr int chains = kChains<M>;
  __m512 sum[chains * M];
  unroll<chains * M>([&](auto i) LAMBDA { sum[i] = _mm512_setzero_ps(); });
  for (int64_t b = 0; b < p.blocks; b++) {
    if (__builtin_expect(at > p.limit, 0)) return nullptr;
    at = Reader::template block<Ask>(at, [&](auto w, __m512i word) LAMBDA {
      constexpr int chain = w % chains;
      unroll<M>([&](auto m) LAMBDA {
        sum[chain * M + m] = Dot::template add<M>(x, w, m, word, sum[chain * M + m]);
      });
    });
    x += Reader::kWords * Dot::kPerWord * M;
  }
  unroll<M>([&](auto m) LAMBDA {
    out[m] = sum[m];
    unroll<chains - 1>([&](auto c) LAMBDA { out[m] += sum[(c + 1) * M + m]; });
  });
  return at;
}

template <class Reader, int M, bool Ask>
INLINE const uint8_t* integer_panel(const Panels& p, const uint8_t* at, const uint32_t* x,
                                    const Rounding* groups, __m512 (&out)[M]) {
  constexpr int chains = kChains<M>;
  unroll<M>([&](auto m) LAMBDA { out[m] = _mm512_setzero_ps(); });
  const int64_t blocks = p.group / kColumns;
  const uint8_t* line = nullptr;
  for (int64_t g = 0; g < p.blocks / blocks; g++) {
    if (!p.open_group(g, &at, &line)) return nullptr;
    Ints sum[chains * M];
    unroll<chains * M>([&](auto i)
                           LAMBDA { sum[i] = i < M ? broadcast_int(-groups[i].excess) : Ints{}; });
    for (int64_t b = 0; b < blocks; b++) {
      if (__builtin_expect(at > p.limit, 0)) return nullptr;
      at = Reader::template block<Ask>(at, [&](auto w, __m512i word) LAMBDA {
        constexpr int chain = w % chains;
        unroll<M>([&](auto m) LAMBDA {
          sum[chain * M + m] = broadcast_int8(x + w * M + m, word, sum[chain * M + m]);
        });
      });
      x += Reader::kWords * M;
    }
    const __m512 scale = group_scales<Reader::kShift>(line);
    unroll<M>([&](auto m) LAMBDA {
      Ints total = sum[m];
      unroll<chains - 1>([&](auto c) LAMBDA { total += sum[(c + 1) * M + m]; });
      const __m512 exact = _mm512_cvtepi32_ps((__m512i)total);
      out[m] =
          _mm512_fmadd_ps(exact, _mm512_mul_ps(scale, _mm512_set1_ps(groups[m].scale)), out[m]);
    });
    groups += M;
  }
  return at;
}

template <class Reader, class Dot, int M, bool Ask = true>
bool decode(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y) {
  const auto* packed = static_cast<const typename Dot::X*>(x.packed);
  for (int64_t panel = first; panel < last; panel++) {
    __m512 out[M];
    unroll<M>([&](auto m) LAMBDA { out[m] = _mm512_setzero_ps(); });  // for the compiler's warning
    const uint8_t* at;
    if constexpr (Reader::kWords == 16)
      at = float_panel<Reader, Dot, M, Ask>(p, p.begin(panel), packed, out);
    else
      at = integer_panel<Reader, M, Ask>(p, p.begin(panel), packed, x.groups, out);
    if (at == nullptr || !p.ends(panel, at)) return false;
    unroll<M>([&](auto m) LAMBDA {
      if (m < x.tokens) store_rows(p, panel, out[m], y.from(m, p));
    });
  }
  return true;
}

}  // namespace
