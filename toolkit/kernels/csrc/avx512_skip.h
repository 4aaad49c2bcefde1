// AVX-512: many tokens and few weights. Pairs of zeros cost nothing.
//
// For 192 columns at a time, each row's pairs that are not zero become a list of (pair, place);
// a row then runs down its list for 64 tokens. Only bf16, and only where that beats expanding: each
// pair loads its activations anew, so with more than a quarter of the weights kept nothing is won.
#pragma once

#include "avx512_decode.h"
#include "avx512_pack.h"

namespace {

constexpr int64_t kSkipTokens = 96;  // fewer do not pay for the lists
constexpr int64_t kSkipBytes = 320;  // of a block of 512 weights: a quarter of them kept
constexpr int64_t kSkipPanels = 8;   // that share the tokens in the first-level cache
constexpr int64_t kSkipBlocks = 6;   // 24 KB of activations of 64 tokens
constexpr int64_t kSkipWidth = 64;   // tokens: four registers
constexpr int64_t kSkipPairs = kSkipBlocks * kColumns / 2;
constexpr int64_t kListLength = kSkipPairs + 16;  // a register is stored at its end

bool skips_zeros(const Panels& p, int64_t tokens) {
  const int64_t bytes = p.limit - p.base;
  return p.values == GBLM_BF16 && p.mask == GBLM_ANY && tokens >= kSkipTokens &&
         bytes <= p.count * p.blocks * kSkipBytes;
}

struct List {
  uint32_t pairs[kListLength];
  uint32_t places[kListLength];
};

struct Skip {
  List lists[kSkipPanels][kRows];
  int64_t lengths[kSkipPanels][kRows];
  float sums[];  // [panel][tile][row][tokens of the tile]

  static int64_t bytes(int64_t tokens) {
    const int64_t padded = round_up(tokens, 16);
    return static_cast<int64_t>(sizeof(Skip)) + kSkipPanels * kRows * padded * 4;
  }
};

// Sixteen registers of sixteen become their columns.
INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  unroll<8>([&](auto i) LAMBDA {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  });
  unroll<4>([&](auto i) LAMBDA {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  });
  unroll<4>([&](auto i) LAMBDA {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  });
  unroll<8>([&](auto i) LAMBDA {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
  });
}

// Append what some blocks of a panel hold to the lists of its rows; nullptr when damaged.
inline const uint8_t* make_lists(const Panels& p, const uint8_t* at, int64_t blocks,
                                 List (&lists)[kRows], int64_t (&lengths)[kRows]) {
  for (int64_t& length : lengths) length = 0;
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t b = 0; b < blocks; b++) {
    if (at > p.limit) return nullptr;
    __m512i words[16];
    at = Bf16<GBLM_ANY>::block(at, [&](auto w, __m512i word) LAMBDA { words[w] = word; });
    transpose(words);
    const __m512i places = _mm512_add_epi32(iota, _mm512_set1_epi32(static_cast<int>(16 * b)));
    unroll<16>([&](auto r) LAMBDA {
      const __mmask16 some = _mm512_test_epi32_mask(words[r], words[r]);
      List& list = lists[r];
      _mm512_storeu_si512(list.pairs + lengths[r], _mm512_maskz_compress_epi32(some, words[r]));
      _mm512_storeu_si512(list.places + lengths[r], _mm512_maskz_compress_epi32(some, places));
      lengths[r] += _mm_popcnt_u32(some);
    });
  }
  return at;
}

// One row and 16 V tokens. x: [pairs][16 V].
template <int V>
inline void walk_list(const List& list, int64_t length, const uint32_t* x, float* sums) {
  __m512 a[V], b[V];  // two chains each
  unroll<V>([&](auto v) LAMBDA {
    a[v] = _mm512_loadu_ps(sums + 16 * v);
    b[v] = _mm512_setzero_ps();
  });
  const auto add = [&](int64_t i, __m512(&to)[V]) LAMBDA {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(list.pairs[i]));
    const uint32_t* tokens = x + list.places[i] * 16 * V;
    unroll<V>([&](auto v) LAMBDA {
      to[v] = _mm512_dpbf16_ps(to[v], (__m512bh)load512(tokens + 16 * v), (__m512bh)pair);
    });
  };
  int64_t i = 0;
  for (; i + 2 <= length; i += 2) {
    add(i, a);
    add(i + 1, b);
  }
  if (i < length) add(i, a);
  unroll<V>([&](auto v) LAMBDA { _mm512_storeu_ps(sums + 16 * v, a[v] + b[v]); });
}

template <int V>
void walk_panel(const List (&lists)[kRows], const int64_t (&lengths)[kRows], const uint32_t* x,
                float* sums) {
  for (int64_t r = 0; r < kRows; r++) walk_list<V>(lists[r], lengths[r], x, sums + r * 16 * V);
}

void walk(int64_t width, const List (&lists)[kRows], const int64_t (&lengths)[kRows],
          const uint32_t* x, float* sums) {
  switch (width) {
    case 16:
      return walk_panel<1>(lists, lengths, x, sums);
    case 32:
      return walk_panel<2>(lists, lengths, x, sums);
    case 48:
      return walk_panel<3>(lists, lengths, x, sums);
    default:
      return walk_panel<4>(lists, lengths, x, sums);
  }
}

// Sums [rows][tokens of the tile] of a panel to y [tokens][rows].
inline void store_tile(const Panels& p, int64_t panel, const float* sums, int64_t width,
                       int64_t tokens, Output y) {
  for (int64_t t = 0; t < tokens; t += 16) {
    __m512i rows[16];
    unroll<16>([&](auto r) LAMBDA { rows[r] = load512(sums + r * width + t); });
    transpose(rows);
    unroll<16>([&](auto i) LAMBDA {
      if (t + i < tokens) store_rows(p, panel, (__m512)rows[i], y.from(t + i, p));
    });
  }
}

bool multiply_skipping(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                       void* memory) {
  const int64_t count = last - first, padded = round_up(x.tokens, 16);
  if (count > kSkipPanels) return false;
  Skip& s = *static_cast<Skip*>(memory);
  std::memset(s.sums, 0, static_cast<size_t>(count * kRows * padded) * 4);
  const uint8_t* at[kSkipPanels];
  for (int64_t i = 0; i < count; i++) at[i] = p.begin(first + i);
  for (int64_t block = 0; block < p.blocks; block += kSkipBlocks) {
    const int64_t blocks = smaller(kSkipBlocks, p.blocks - block);
    for (int64_t i = 0; i < count; i++) {
      at[i] = make_lists(p, at[i], blocks, s.lists[i], s.lengths[i]);
      if (at[i] == nullptr) return false;
    }
    for (int64_t t = 0; t < padded; t += kSkipWidth) {
      const int64_t width = smaller(kSkipWidth, padded - t);
      const uint32_t* tile =
          static_cast<const uint32_t*>(x.packed) + kColumns / 2 * (t * p.blocks + block * width);
      for (int64_t i = 0; i < count; i++)
        walk(width, s.lists[i], s.lengths[i], tile, s.sums + (i * padded + t) * kRows);
    }
  }
  for (int64_t i = 0; i < count; i++) {
    if (!p.ends(first + i, at[i])) return false;
    for (int64_t t = 0; t < padded; t += kSkipWidth)
      store_tile(p, first + i, s.sums + (i * padded + t) * kRows, smaller(kSkipWidth, padded - t),
                 smaller(kSkipWidth, x.tokens - t), y.from(t, p));
  }
  return true;
}

}  // namespace
