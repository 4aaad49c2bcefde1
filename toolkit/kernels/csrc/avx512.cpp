// AVX-512 with BF16, VNNI, VBMI2 and GFNI (Zen 4, Sapphire Rapids and later).
//
// Up to 16 tokens: each word is expanded into a register and multiplied at once, so weights are
// read once and never written. More tokens: two panels are expanded into cache, 1024 columns at a
// time, and multiplied from there.
#include <immintrin.h>

#include <utility>

#include "isa.h"

#define INLINE inline __attribute__((always_inline))
#define LAMBDA __attribute__((always_inline))

namespace {

constexpr int kMaxDecode = 16;        // tokens that share one expanded word
constexpr int kMaxTile = 12;          // 2 x 12 sums fill 24 of 32 registers
constexpr int64_t kCacheColumns = 1024;  // two expanded panels: 64 KB of bf16
constexpr int64_t kAhead = 4096;      // prefetch distance in bytes

// f(0) … f(N - 1) with constants: g++ keeps arrays in registers only if every index is one.
template <class F, int... I>
INLINE void each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
INLINE void unroll(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}

template <int Lines>
INLINE void prefetch(const uint8_t* at) {
  unroll<Lines>([&](auto i) LAMBDA {
    _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead + kLine * i, _MM_HINT_T0);
  });
}

// Expanding in place: on Zen 4 the instruction waits for the old value of its destination.
INLINE __m512i expand16(uint32_t mask, __m512i word) {
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(word) : "Yk"(static_cast<__mmask32>(mask)));
  return word;
}
INLINE __m512i expand8(uint64_t mask, __m512i word) {
  asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(word) : "Yk"(static_cast<__mmask64>(mask)));
  return word;
}
INLINE __m512i load512(const void* at) { return _mm512_loadu_si512(at); }
INLINE __m512i load256(const void* at) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
}

// 64 bytes from anywhere: two halves are faster than one load that crosses a line (Zen 5: 1.3x).
INLINE __m512i load_split(const uint8_t* at) {
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32));
  return _mm512_inserti64x4(load256(at), high, 1);
}

// The bytes of one word (of two, for int4): 2:4 always fills half of them.
template <int Mask>
INLINE __m512i load_packed(const uint8_t* at) {
  return Mask == GBLM_2_OF_4 ? load256(at) : Mask == GBLM_ANY ? load_split(at) : load512(at);
}

// ---- Readers: visit(word, register) for every word of a block; return where it ends.

template <int Mask>
struct Bf16 {
  static constexpr int kWords = 16;
  static constexpr bool kInPlace = Mask == GBLM_DENSE;
  static constexpr int kLines = Mask == GBLM_DENSE ? 16 : 9;

  template <class Visit>
  static INLINE const uint8_t* block(const uint8_t* at, Visit&& visit) {
    prefetch<kLines>(at);
    if constexpr (Mask == GBLM_DENSE) {
      unroll<kWords>([&](auto w) LAMBDA { visit(w, load512(at + kLine * w)); });
      return at + kWords * kLine;
    } else {
      const uint8_t* v = at + kMaskBytes;
      unroll<kWords>([&](auto w) LAMBDA {
        const uint32_t mask = load<uint32_t>(at + 4 * w);
        visit(w, expand16(mask, load_split(v)));
        // Two columns of 2:4 hold 0..4 of the four kept, so a pair of words always holds 32.
        if constexpr (Mask == GBLM_2_OF_4 && w % 2 == 1)
          v += 64 - 2 * _mm_popcnt_u32(load<uint32_t>(at + 4 * (w - 1)));
        else
          v += 2 * _mm_popcnt_u32(mask);
      });
      return v;
    }
  }
};

template <int Mask>
struct Int8 {
  static constexpr int kWords = 8;
  static constexpr bool kInPlace = Mask == GBLM_DENSE;
  static constexpr int kLines = Mask == GBLM_DENSE ? 8 : 5;
  static constexpr int kShift = 0;

  template <class Visit>
  static INLINE const uint8_t* block(const uint8_t* at, Visit&& visit) {
    prefetch<kLines>(at);
    const uint8_t* v = Mask == GBLM_DENSE ? at : at + kMaskBytes;
    unroll<kWords>([&](auto w) LAMBDA {
      if constexpr (Mask == GBLM_DENSE) {
        visit(w, load512(v));
        v += 64;
      } else {
        const uint64_t mask = load<uint64_t>(at + 8 * w);
        visit(w, expand8(mask, load_packed<Mask>(v)));
        v += Mask == GBLM_2_OF_4 ? 32 : _mm_popcnt_u64(mask);
      }
    });
    return v;
  }
};

// Nibbles become bytes of 16 times their value: shifting left needs no sign extension.
template <int Mask>
struct Int4 {
  static constexpr int kWords = 8;
  static constexpr bool kInPlace = false;
  static constexpr int kLines = Mask == GBLM_DENSE ? 4 : 3;
  static constexpr int kShift = 4;

  template <class Visit>
  static INLINE const uint8_t* block(const uint8_t* at, Visit&& visit) {
    prefetch<kLines>(at);
    const __m512i high = _mm512_set1_epi8(static_cast<char>(0xF0));
    const __m512i shift = _mm512_set1_epi64(0x0000000001020408);  // every byte << 4, in one step
    const uint8_t* v = Mask == GBLM_DENSE ? at : at + kMaskBytes;
    unroll<kWords / 2>([&](auto i) LAMBDA {
      constexpr std::integral_constant<int, 2 * i> even;
      constexpr std::integral_constant<int, 2 * i + 1> odd;
      const __m512i both = load_packed<Mask>(v);
      const __m512i low = _mm512_gf2p8affine_epi64_epi8(both, shift, 0);
      const __m512i top = _mm512_and_si512(both, high);
      if constexpr (Mask == GBLM_DENSE) {
        visit(even, low);
        visit(odd, top);
        v += 64;
      } else {
        const uint64_t a = load<uint64_t>(at + 16 * i), b = load<uint64_t>(at + 16 * i + 8);
        visit(even, expand8(a, low));
        visit(odd, expand8(b, top));
        v += Mask == GBLM_2_OF_4 ? 32 : larger(_mm_popcnt_u64(a), _mm_popcnt_u64(b));
      }
    });
    return v;
  }
};

// ---- Dot products. Weights are bf16 pairs or signed bytes, activations bf16 pairs or unsigned.

INLINE __m512 broadcast_bf16(const uint32_t* x, __m512i w, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(*x)));
}
// g++ keeps arrays of sums in registers only if they are read and written as this one type.
typedef int32_t Ints __attribute__((vector_size(64)));

INLINE Ints multiply_int8(__m512i x, __m512i w, Ints sum) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, x, w);
}
INLINE Ints broadcast_int8(const uint32_t* x, __m512i w, Ints sum) {
  return multiply_int8(_mm512_set1_epi32(static_cast<int>(*x)), w, sum);
}
// The line before a group: its scales, and what the +128 of the activations has added.
template <int Shift>
INLINE __m512 group_scales(const uint8_t* line) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)line));
  return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)),
                       _mm512_set1_ps(1.0f / (1 << Shift)));
}
template <int Shift>
INLINE Ints group_excess(const uint8_t* line) {
  const __m512i sums = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)(line + 32)));
  return (Ints)_mm512_slli_epi32(sums, 7 + Shift);
}

// ---- One panel and a few tokens, expanded in registers.

template <int M>
constexpr int kChains = M <= 2 ? 4 : M <= 4 ? 2 : 1;  // independent sums hide the latency

template <class Reader, int M>
INLINE const uint8_t* float_panel(const Panels& p, const uint8_t* at, const uint32_t* x,
                                  __m512 (&out)[M]) {
  constexpr int chains = kChains<M>;
  __m512 sum[chains * M];
  unroll<chains * M>([&](auto i) LAMBDA { sum[i] = _mm512_setzero_ps(); });
  for (int64_t b = 0; b < p.blocks; b++) {
    if (__builtin_expect(at > p.limit, 0)) return nullptr;
    at = Reader::block(at, [&](auto w, __m512i word) LAMBDA {
      constexpr int chain = w % chains;
      unroll<M>([&](auto m) LAMBDA {
        sum[chain * M + m] = broadcast_bf16(x + w * M + m, word, sum[chain * M + m]);
      });
    });
    x += Reader::kWords * M;
  }
  unroll<M>([&](auto m) LAMBDA {
    out[m] = sum[m];
    unroll<chains - 1>([&](auto c) LAMBDA { out[m] += sum[(c + 1) * M + m]; });
  });
  return at;
}

template <class Reader, int M>
INLINE const uint8_t* integer_panel(const Panels& p, const uint8_t* at, const uint32_t* x,
                                    const float* scales, __m512 (&out)[M]) {
  constexpr int chains = kChains<M>;
  unroll<M>([&](auto m) LAMBDA { out[m] = _mm512_setzero_ps(); });
  const int64_t blocks = p.group / kColumns;
  for (int64_t g = 0; g < p.blocks / blocks; g++) {
    if (__builtin_expect(at > p.limit, 0)) return nullptr;
    const uint8_t* line = at;
    at += kLine;
    Ints sum[chains * M];
    unroll<chains * M>([&](auto i) LAMBDA { sum[i] = Ints{}; });
    for (int64_t b = 0; b < blocks; b++) {
      if (__builtin_expect(at > p.limit, 0)) return nullptr;
      at = Reader::block(at, [&](auto w, __m512i word) LAMBDA {
        constexpr int chain = w % chains;
        unroll<M>([&](auto m) LAMBDA {
          sum[chain * M + m] = broadcast_int8(x + w * M + m, word, sum[chain * M + m]);
        });
      });
      x += Reader::kWords * M;
    }
    const __m512 scale = group_scales<Reader::kShift>(line);
    const Ints excess = group_excess<Reader::kShift>(line);
    unroll<M>([&](auto m) LAMBDA {
      Ints total = sum[m] - excess;
      unroll<chains - 1>([&](auto c) LAMBDA { total += sum[(c + 1) * M + m]; });
      const __m512 exact = _mm512_cvtepi32_ps((__m512i)total);
      out[m] = _mm512_fmadd_ps(exact, _mm512_mul_ps(scale, _mm512_set1_ps(scales[m])), out[m]);
    });
    scales += M;
  }
  return at;
}

INLINE void store_rows(const Panels& p, int64_t panel, __m512 sums, uint16_t* y) {
  const int64_t left = p.rows - panel * kRows;
  const __mmask16 rows = left >= kRows ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
  _mm256_mask_storeu_epi16(y + panel * kRows, rows, (__m256i)_mm512_cvtneps_pbh(sums));
}

template <class Reader, int M>
bool decode(const Panels& p, const Activations& x, int64_t first, int64_t last, uint16_t* y) {
  const uint32_t* packed = static_cast<const uint32_t*>(x.packed);
  for (int64_t panel = first; panel < last; panel++) {
    __m512 out[M];
    unroll<M>([&](auto m) LAMBDA { out[m] = _mm512_setzero_ps(); });  // for the compiler's warning
    const uint8_t* at;
    if constexpr (Reader::kWords == 16)
      at = float_panel<Reader, M>(p, p.begin(panel), packed, out);
    else
      at = integer_panel<Reader, M>(p, p.begin(panel), packed, x.scales, out);
    if (at == nullptr || !p.ends(panel, at)) return false;
    unroll<M>([&](auto m) LAMBDA {
      if (m < x.tokens) store_rows(p, panel, out[m], y + m * p.rows);
    });
  }
  return true;
}

// ---- Two panels and many tokens, expanded into cache.

template <int T>
void float_tile(const uint8_t* w0, const uint8_t* w1, int64_t words, const uint32_t* x, float* c) {
  __m512 a[T], b[T];
  unroll<T>([&](auto t) LAMBDA {
    a[t] = _mm512_loadu_ps(c + 32 * t);
    b[t] = _mm512_loadu_ps(c + 32 * t + 16);
  });
  for (int64_t w = 0; w < words; w++, x += T) {
    const __m512i word0 = load512(w0 + kLine * w), word1 = load512(w1 + kLine * w);
    unroll<T>([&](auto t) LAMBDA {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(x[t]));
      a[t] = _mm512_dpbf16_ps(a[t], (__m512bh)word0, (__m512bh)pair);
      b[t] = _mm512_dpbf16_ps(b[t], (__m512bh)word1, (__m512bh)pair);
    });
  }
  unroll<T>([&](auto t) LAMBDA {
    _mm512_storeu_ps(c + 32 * t, a[t]);
    _mm512_storeu_ps(c + 32 * t + 16, b[t]);
  });
}

template <int Shift, int T>
void integer_tile(const uint8_t* w0, const uint8_t* w1, int64_t words, const uint32_t* x, float* c,
                  const float* scales, const uint8_t* line0, const uint8_t* line1) {
  Ints a[T], b[T];
  unroll<T>([&](auto t) LAMBDA {
    a[t] = Ints{};
    b[t] = Ints{};
  });
  for (int64_t w = 0; w < words; w++, x += T) {
    const __m512i word0 = load512(w0 + kLine * w), word1 = load512(w1 + kLine * w);
    unroll<T>([&](auto t) LAMBDA {
      const __m512i quad = _mm512_set1_epi32(static_cast<int>(x[t]));
      a[t] = multiply_int8(quad, word0, a[t]);
      b[t] = multiply_int8(quad, word1, b[t]);
    });
  }
  const __m512 s0 = group_scales<Shift>(line0), s1 = group_scales<Shift>(line1);
  const Ints e0 = group_excess<Shift>(line0), e1 = group_excess<Shift>(line1);
  unroll<T>([&](auto t) LAMBDA {
    const __m512 s = _mm512_set1_ps(scales[t]);
    float* sum = c + 32 * t;
    const __m512 exact0 = _mm512_cvtepi32_ps((__m512i)(a[t] - e0));
    const __m512 exact1 = _mm512_cvtepi32_ps((__m512i)(b[t] - e1));
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(exact0, _mm512_mul_ps(s0, s), _mm512_loadu_ps(sum)));
    _mm512_storeu_ps(sum + 16,
                     _mm512_fmadd_ps(exact1, _mm512_mul_ps(s1, s), _mm512_loadu_ps(sum + 16)));
  });
}

// Tokens that are multiplied together; up to 16 of them stay with one expanded word.
int64_t tile_width(int64_t tokens) {
  if (tokens <= kMaxDecode) {
    for (const int64_t width : {1, 2, 3, 4, 6, 8, 12, 16})
      if (tokens <= width) return width;
  }
  const int64_t tiles = (tokens + kMaxTile - 1) / kMaxTile;
  return (tokens + tiles - 1) / tiles;
}

constexpr decltype(&float_tile<1>) kFloatTiles[] = {
    float_tile<1>, float_tile<2>, float_tile<3>, float_tile<4>,  float_tile<5>,  float_tile<6>,
    float_tile<7>, float_tile<8>, float_tile<9>, float_tile<10>, float_tile<11>, float_tile<12>};
template <int S>
constexpr decltype(&integer_tile<S, 1>) kIntegerTiles[] = {
    integer_tile<S, 1>, integer_tile<S, 2>,  integer_tile<S, 3>,  integer_tile<S, 4>,
    integer_tile<S, 5>, integer_tile<S, 6>,  integer_tile<S, 7>,  integer_tile<S, 8>,
    integer_tile<S, 9>, integer_tile<S, 10>, integer_tile<S, 11>, integer_tile<S, 12>};

// Some blocks of a panel as plain words, and where the stream goes on (nullptr: damaged).
struct Words {
  const uint8_t* first;
  const uint8_t* next;
};

template <class Reader>
Words expand(const Panels& p, const uint8_t* at, int64_t blocks, uint8_t* cache) {
  const uint8_t* first = Reader::kInPlace ? at : cache;
  for (int64_t b = 0; b < blocks; b++) {
    if (at > p.limit) return {first, nullptr};
    at = Reader::block(at, [&](auto w, __m512i word) LAMBDA {
      if constexpr (!Reader::kInPlace) _mm512_store_si512(cache + kLine * w, word);
    });
    cache += kLine * Reader::kWords;
  }
  return {first, at};
}

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

template <class Reader>
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
      const uint32_t* tile = static_cast<const uint32_t*>(x.packed) +
                             Reader::kWords * (t * p.blocks + block * n);
      kFloatTiles[n - 1](w[0].first, w[1].first, blocks * Reader::kWords, tile,
                         s.sums + t * 2 * kRows);
    }
  }
  return true;
}

template <class Reader>
bool integer_pair(const Panels& p, const Activations& x, Scratch& s, const uint8_t* (&at)[2]) {
  const int64_t width = tile_width(x.tokens);
  const int64_t blocks = p.group / kColumns, groups = p.blocks / blocks;
  const int64_t together = larger<int64_t>(1, kCacheColumns * 2 / p.group);
  for (int64_t g = 0; g < groups; g += together) {
    const int64_t count = smaller(together, groups - g);
    const uint8_t *lines[2][kCacheColumns * 2 / kColumns], *words[2][kCacheColumns * 2 / kColumns];
    for (int i = 0; i < 2; i++) {
      uint8_t* cache = s.cache[i];
      for (int64_t j = 0; j < count; j++, cache += p.group * kRows) {
        if (at[i] > p.limit) return false;
        lines[i][j] = at[i];
        const Words w = expand<Reader>(p, at[i] + kLine, blocks, cache);
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
        kIntegerTiles<Reader::kShift>[n - 1](words[0][j], words[1][j], blocks * Reader::kWords, tile,
                             s.sums + t * 2 * kRows, x.scales + t * groups + (g + j) * n,
                             lines[0][j], lines[1][j]);
      }
    }
  }
  return true;
}

template <class Reader>
bool pairs(const Panels& p, const Activations& x, int64_t first, int64_t last, uint16_t* y,
           void* memory) {
  for (int64_t panel = first; panel < last; panel += 2) {
    Scratch s(memory, x.tokens);
    const int64_t pair[2] = {panel, smaller(panel + 1, p.count - 1)};
    const uint8_t* at[2] = {p.begin(pair[0]), p.begin(pair[1])};
    bool good;
    if constexpr (Reader::kWords == 16)
      good = float_pair<Reader>(p, x, s, at);
    else
      good = integer_pair<Reader>(p, x, s, at);
    for (int i = 0; i < 2; i++)
      good = good && p.ends(pair[i], at[i]);
    if (!good) return false;
    for (int64_t t = 0; t < x.tokens; t++)
      for (int i = 0; i < 1 + (pair[1] != pair[0]); i++)
        store_rows(p, pair[i], _mm512_loadu_ps(s.sums + t * 2 * kRows + i * kRows), y + t * p.rows);
  }
  return true;
}

// ---- Packing of activations: tiles of [words][tokens of the tile].

void pack_floats(const Panels& p, const uint16_t* x, int64_t tokens, int64_t width, uint32_t* to) {
  const int64_t words = p.columns / 2, padded = p.blocks * kColumns / 2;
  for (int64_t t = 0; t < width; t++) {
    const uint16_t* row = x + t * p.columns;
    const int64_t filled = t < tokens ? words : 0;
    if (width == 1)
      std::memcpy(to, row, static_cast<size_t>(words) * 4);
    else
      for (int64_t w = 0; w < filled; w++) to[w * width + t] = load<uint32_t>(row + 2 * w);
    for (int64_t w = filled; w < padded; w++) to[w * width + t] = 0;
  }
}

INLINE __m512 widen(const uint16_t* x) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE float largest(const uint16_t* x, int64_t count) {
  // As integers, magnitudes of bf16 are in order, and NaN is above all.
  __m512i most = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  for (int64_t i = 0; i < count; i += 32)
    most = _mm512_max_epu16(most, _mm512_and_si512(load512(x + i), magnitude));
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most),
                                        _mm512_extracti64x4_epi64(most, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half),
                                        _mm256_extracti128_si256(half, 1));
  const __m128i inverted = _mm_xor_si128(quarter, _mm_set1_epi16(-1));
  const int least = _mm_extract_epi16(_mm_minpos_epu16(inverted), 0);
  return from_bf16(static_cast<uint16_t>(~least));
}

void pack_integers(const Panels& p, const uint16_t* x, int64_t tokens, int64_t width, uint32_t* to,
                   float* scales) {
  const int64_t groups = p.columns / p.group;
  const __m512i offset = _mm512_set1_epi32(128);
  for (int64_t t = 0; t < width; t++) {
    for (int64_t g = 0; g < groups; g++) {
      const uint16_t* row = x + smaller(t, tokens - 1) * p.columns + g * p.group;
      const float most = largest(row, p.group);
      const __m512 inverse = _mm512_set1_ps(most > kLeast ? 127 / most : 0);
      scales[g * width + t] = most / 127;
      uint32_t* quad = to + g * p.group / 4 * width + t;
      for (int64_t k = 0; k < p.group; k += 16) {
        const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(widen(row + k), inverse));
        const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(code, offset));
        if (width == 1) {
          _mm_storeu_si128((__m128i*)(quad + k / 4), bytes);
        } else {
          quad[(k / 4 + 0) * width] = static_cast<uint32_t>(_mm_extract_epi32(bytes, 0));
          quad[(k / 4 + 1) * width] = static_cast<uint32_t>(_mm_extract_epi32(bytes, 1));
          quad[(k / 4 + 2) * width] = static_cast<uint32_t>(_mm_extract_epi32(bytes, 2));
          quad[(k / 4 + 3) * width] = static_cast<uint32_t>(_mm_extract_epi32(bytes, 3));
        }
      }
    }
  }
}

// ---- The table that the driver sees.

int64_t packed_bytes(const Panels& p, int64_t tokens) {
  const int64_t padded = round_up(tokens, tile_width(tokens));
  return padded * p.blocks * kColumns * (p.values == GBLM_BF16 ? 2 : 1);
}
int64_t scratch_bytes(const Panels&, int64_t tokens) {
  return 2 * kCacheBytes + tokens * 2 * kRows * static_cast<int64_t>(sizeof(float));
}
int64_t tiles(const Panels&, int64_t tokens) {
  const int64_t width = tile_width(tokens);
  return (tokens + width - 1) / width;
}

void pack(const Panels& p, const uint16_t* x, int64_t tokens, int64_t tile, void* packed,
          float* scales) {
  const int64_t width = tile_width(tokens), first = tile * width;
  const int64_t here = smaller(width, tokens - first);
  const int64_t padded = tokens <= kMaxDecode ? width : here;
  uint32_t* to = static_cast<uint32_t*>(packed);
  x += first * p.columns;
  if (p.values == GBLM_BF16)
    pack_floats(p, x, here, padded, to + first * p.blocks * kColumns / 2);
  else
    pack_integers(p, x, here, padded, to + first * p.blocks * kColumns / 4,
                  scales + first * (p.columns / p.group));
}

template <class Reader>
bool multiply_with(const Panels& p, const Activations& x, int64_t first, int64_t last, uint16_t* y,
                   void* scratch) {
  if (x.tokens > kMaxDecode) return pairs<Reader>(p, x, first, last, y, scratch);
  switch (tile_width(x.tokens)) {
    case 1: return decode<Reader, 1>(p, x, first, last, y);
    case 2: return decode<Reader, 2>(p, x, first, last, y);
    case 3: return decode<Reader, 3>(p, x, first, last, y);
    case 4: return decode<Reader, 4>(p, x, first, last, y);
    case 6: return decode<Reader, 6>(p, x, first, last, y);
    case 8: return decode<Reader, 8>(p, x, first, last, y);
    case 12: return decode<Reader, 12>(p, x, first, last, y);
    default: return decode<Reader, 16>(p, x, first, last, y);
  }
}

bool multiply(const Panels& p, const Activations& x, int64_t first, int64_t last, uint16_t* y,
              void* scratch) {
  switch (p.values * 3 + p.mask) {
    case GBLM_BF16 * 3 + GBLM_DENSE:
      return multiply_with<Bf16<GBLM_DENSE>>(p, x, first, last, y, scratch);
    case GBLM_BF16 * 3 + GBLM_ANY:
      return multiply_with<Bf16<GBLM_ANY>>(p, x, first, last, y, scratch);
    case GBLM_BF16 * 3 + GBLM_2_OF_4:
      return multiply_with<Bf16<GBLM_2_OF_4>>(p, x, first, last, y, scratch);
    case GBLM_INT8 * 3 + GBLM_DENSE:
      return multiply_with<Int8<GBLM_DENSE>>(p, x, first, last, y, scratch);
    case GBLM_INT8 * 3 + GBLM_ANY:
      return multiply_with<Int8<GBLM_ANY>>(p, x, first, last, y, scratch);
    case GBLM_INT8 * 3 + GBLM_2_OF_4:
      return multiply_with<Int8<GBLM_2_OF_4>>(p, x, first, last, y, scratch);
    case GBLM_INT4 * 3 + GBLM_DENSE:
      return multiply_with<Int4<GBLM_DENSE>>(p, x, first, last, y, scratch);
    case GBLM_INT4 * 3 + GBLM_ANY:
      return multiply_with<Int4<GBLM_ANY>>(p, x, first, last, y, scratch);
    case GBLM_INT4 * 3 + GBLM_2_OF_4:
      return multiply_with<Int4<GBLM_2_OF_4>>(p, x, first, last, y, scratch);
    default: return false;
  }
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("gfni") &&
         __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("fma");
}

}  // namespace

const Isa kAvx512 = {"avx512",      supported, 8, packed_bytes, scratch_bytes, tiles, pack,
                     multiply};
