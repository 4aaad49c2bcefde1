// AVX2: blocks of planes, and dense integers. Of planes a shuffle picks the activation of each kept
// weight, so that weights which are gone are neither expanded nor multiplied.
//
// A step is one register of weights and the control that picks their activations. Those of integers
// are of 16 columns, as many as a shuffle of bytes reaches: the words of two registers are paired
// so that one has columns 0 to 15 of a block, the other 16 to 31. A few tokens take their steps
// from the blocks; for more, the steps of some columns are made once, in cache.
#pragma once

#include "columns.h"
#include "planes.h"

namespace {

INLINE __m256i load256(const void* at) { return _mm256_loadu_si256((const __m256i*)at); }
INLINE __m128i load128(const void* at) { return _mm_loadu_si128((const __m128i*)at); }
INLINE __m256i load_twice(const void* at) { return _mm256_broadcastsi128_si256(load128(at)); }
INLINE __m256i all_bytes(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }

// ---- Controls.

// By the nibbles of a byte of mask: the k-th column that each keeps. Of 4:8 the high nibble's are
// counted back from the byte's fourth; what a nibble has not is 0, for just one of the two has it.
template <int Mask>
struct Nibbles {
  static constexpr bool kFour = Mask == GBLM_4_OF_8;
  alignas(32) uint8_t low[4][32] = {}, high[4][32] = {}, last[32] = {};

  constexpr Nibbles() {
    constexpr uint8_t none = kFour ? 0 : 255;
    for (int bits = 0; bits < 32; bits++) {  // each table twice, for both halves of a register
      uint8_t kept[4] = {};
      int count = 0;
      for (uint8_t i = 0; i < 4; i++)
        if (bits >> i & 1) kept[count++] = i;
      for (int k = 0; k < 4; k++) {
        const int j = kFour ? k + count - 4 : k;
        low[k][bits] = k < count ? kept[k] : none;
        high[k][bits] = j >= 0 && j < count ? static_cast<uint8_t>(4 + kept[j]) : none;
      }
      // Of the neighbour's eight columns.
      last[bits] = static_cast<uint8_t>(8 ^ (4 + kept[count > 0 ? count - 1 : 0]));
    }
  }
};
template <int Mask>
constexpr Nibbles<Mask> kNibbles;

// The K-th of two lists in order, whose second is behind the first.
template <int K>
INLINE __m256i merge(const __m256i (&low)[4], const __m256i (&high)[4]) {
  __m256i kth = _mm256_min_epu8(low[K], high[K]);
  unroll<K>([&](auto j)
                LAMBDA { kth = _mm256_min_epu8(kth, _mm256_max_epu8(low[K - 1 - j], high[j])); });
  return kth;
}

// Which of its eight columns a weight of plane k belongs to; + 8: of its neighbour's. Whatever else
// damaged masks give, shuffles look nowhere but into registers.
template <int Mask>
INLINE void make_controls(__m256i masks, __m256i (&control)[4]) {
  const Nibbles<Mask>& nibbles = kNibbles<Mask>;
  const __m256i lows = _mm256_and_si256(masks, all_bytes(15));
  const __m256i highs = _mm256_and_si256(_mm256_srli_epi16(masks, 4), all_bytes(15));
  __m256i low[4], high[4];
  unroll<4>([&](auto k) LAMBDA {
    low[k] = _mm256_shuffle_epi8(load256(nibbles.low[k]), lows);
    high[k] = _mm256_shuffle_epi8(load256(nibbles.high[k]), highs);
    if constexpr (Mask == GBLM_4_OF_8) control[k] = _mm256_or_si256(low[k], high[k]);
  });
  if constexpr (Mask == GBLM_8_OF_16) {
    unroll<4>([&](auto k) LAMBDA { control[k] = merge<k>(low, high); });
    // A byte without a fourth has 255, and its neighbour a fifth.
    const __m256i last = _mm256_shuffle_epi8(load256(nibbles.last), highs);
    const __m256i fifth = _mm256_or_si256(_mm256_slli_epi16(last, 8), _mm256_srli_epi16(last, 8));
    control[3] = _mm256_blendv_epi8(control[3], fifth, control[3]);
  }
}

// ---- Steps. A block calls visit(step, control, value) for each of its steps, in order; sums add a
// step of T tokens, whose activations are x [T][kTokenBytes].

// Of the dwords of two registers the low words, and the high words.
INLINE void pair_words(__m256i a, __m256i b, __m256i (&pair)[2]) {
  pair[0] = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA);
  pair[1] = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xAA);
}
// Of columns 0 to 7 and 8 to 15.
INLINE __m256i reach_16(__m256i control) {
  return _mm256_xor_si256(control, _mm256_set1_epi16(0x0800));
}
// Low or high nibbles as codes.
template <int High>
INLINE __m256i take_codes(__m256i bytes) {
  if constexpr (High == 1) bytes = _mm256_srli_epi16(bytes, 4);
  return _mm256_sub_epi8(_mm256_and_si256(bytes, all_bytes(15)), all_bytes(8));
}
// Sums are added to in order: g++ would add products to each other first, and keep all in memory.
INLINE void add_to(__m256i& sum, __m256i dwords) {
  sum = _mm256_add_epi32(sum, dwords);
  asm("" : "+x"(sum));
}

// Activations + 128 meet codes with a sign. A sum of 64 columns of int4 is at most 32 * 8 * 127,
// and right in 16 bits though its parts are not. One register has words of 16 rows, or two have
// dwords of eight.
template <class Steps, int T>
struct Sums4 {
  static constexpr int kParts = Steps::kExcess;
  __m256i part[kParts][T], sum[2][T];

  INLINE Sums4() {
    unroll<T>([&](auto t) LAMBDA {
      unroll<kParts>([&](auto i) LAMBDA { part[i][t] = _mm256_setzero_si256(); });
      sum[0][t] = sum[1][t] = _mm256_setzero_si256();
    });
  }
  template <int S>
  INLINE void add(const uint8_t* x, __m256i control, __m256i code) {
    unroll<T>([&](auto t) LAMBDA {
      const __m256i picked = Steps::template pick<S>(x + Steps::kTokenBytes * t, control);
      __m256i& to = part[S % kParts][t];
      to = _mm256_add_epi16(to, _mm256_maddubs_epi16(picked, code));
      asm("" : "+x"(to));
    });
  }
  // After 64 columns: what they have too much is the same for all tokens.
  template <int I>
  INLINE void widen(__m256i excess) {
    unroll<T>([&](auto t) LAMBDA {
      const __m256i words = _mm256_sub_epi16(part[I][t], excess);
      part[I][t] = _mm256_setzero_si256();
      add_to(sum[I][t],
             _mm256_madd_epi16(words, kParts == 1 ? _mm256_set1_epi32(1) : _mm256_set1_epi16(1)));
      if constexpr (kParts == 1) add_to(sum[1][t], _mm256_srai_epi32(words, 16));
    });
  }
  INLINE __m256 get(int half, int t) const { return _mm256_cvtepi32_ps(sum[half][t]); }
};

// Sizes of codes meet activations with the code's sign: -128 has a size without a sign, and no
// activation is -128. Dwords of eight rows.
template <class Steps, int T>
struct Sums8 {
  __m256i sum[2][T];

  INLINE Sums8() {
    unroll<T>([&](auto t) LAMBDA { sum[0][t] = sum[1][t] = _mm256_setzero_si256(); });
  }
  template <int S>
  INLINE void add(const uint8_t* x, __m256i control, __m256i code) {
    const __m256i size = _mm256_abs_epi8(code);
    unroll<T>([&](auto t) LAMBDA {
      const __m256i picked = Steps::template pick<S>(x + Steps::kTokenBytes * t, control);
      const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(picked, code));
      add_to(sum[Steps::rows(S)][t], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    });
  }
  INLINE __m256 get(int half, int t) const { return _mm256_cvtepi32_ps(sum[half][t]); }
};

// What integers have in common: 32 codes a step.
struct Integers {
  static constexpr int kTokenBytes = 32;
  static constexpr bool kInteger = true;

  // From 16 of a token's activations.
  static INLINE __m256i pick_from(const uint8_t* x, __m256i control) {
    return _mm256_shuffle_epi8(load_twice(x), control);
  }
};

// int4, planes: words of rows 0, 8, 1, 9, …
template <int Mask>
struct Codes4 : Integers {
  static constexpr int kSteps = 8, kExcess = 1;
  static constexpr bool kControls = true;
  template <int T>
  using Sums = Sums4<Codes4, T>;

  template <class Visit>
  static INLINE void block(const uint8_t* at, Visit&& visit) {
    __m256i masks[2], codes[2][2];
    pair_words(load256(at), load256(at + 32), masks);
    unroll<2>([&](auto i) LAMBDA {
      const uint8_t* line = at + kMaskBytes + kLine * i;
      pair_words(load256(line), load256(line + 32), codes[i]);
    });
    unroll<2>([&](auto half) LAMBDA {
      __m256i control[4];
      make_controls<Mask>(masks[half], control);
      unroll<4>([&](auto k) LAMBDA {
        visit(std::integral_constant<int, 4 * half + k>{}, reach_16(control[k]),
              take_codes<k % 2>(codes[k / 2][half]));
      });
    });
  }
  template <int S>
  static INLINE __m256i pick(const uint8_t* x, __m256i control) {
    return pick_from(x + S / 4 * 16, control);
  }
};

// int8, planes: dwords of two planes.
template <int Mask>
struct Codes8 : Integers {
  static constexpr int kSteps = 8, kExcess = 0;
  static constexpr bool kControls = true;
  static constexpr int rows(int step) { return step / 4; }
  template <int T>
  using Sums = Sums8<Codes8, T>;

  template <class Visit>
  static INLINE void block(const uint8_t* at, Visit&& visit) {
    unroll<2>([&](auto rows) LAMBDA {
      __m256i control[4];
      make_controls<Mask>(load256(at + 32 * rows), control);
      unroll<2>([&](auto i) LAMBDA {
        const uint8_t* plane = at + kMaskBytes + 32 * rows + 2 * kLine * i;
        __m256i controls[2], codes[2];
        pair_words(control[2 * i], control[2 * i + 1], controls);
        pair_words(load256(plane), load256(plane + kLine), codes);
        unroll<2>([&](auto half) LAMBDA {
          visit(std::integral_constant<int, 4 * rows + 2 * i + half>{}, reach_16(controls[half]),
                _mm256_xor_si256(codes[half], all_bytes(0x80)));
        });
      });
    });
  }
  template <int S>
  static INLINE __m256i pick(const uint8_t* x, __m256i control) {
    return pick_from(x + S % 2 * 16, control);
  }
};

// Dense integers: half of the rows of a word, whose four activations are the same for all.
template <int Values>
struct Words : Integers {
  static constexpr int kSteps = 16, kExcess = Values == GBLM_INT4 ? 2 : 0;
  static constexpr bool kControls = false;
  static constexpr int rows(int step) { return step % 2; }
  template <int T>
  using Sums = std::conditional_t<Values == GBLM_INT4, Sums4<Words, T>, Sums8<Words, T>>;

  template <class Visit>
  static INLINE void block(const uint8_t* at, Visit&& visit) {
    unroll<kSteps>([&](auto s) LAMBDA {
      constexpr int word = s / 2, rows = s % 2;
      const __m256i none = _mm256_setzero_si256();
      if constexpr (Values == GBLM_INT4)
        visit(s, none, take_codes<word % 2>(load256(at + word / 2 * kLine + 32 * rows)));
      else
        visit(s, none, _mm256_xor_si256(load256(at + 32 * s), all_bytes(0x80)));
    });
  }
  template <int S>
  static INLINE __m256i pick(const uint8_t* x, __m256i) {
    return _mm256_set1_epi32(load<int32_t>(x + S / 2 * 4));
  }
};

// bf16: a step is a byte of mask of eight rows, widened; activations are float32. Of 8:16 plane 3
// makes two steps, what is of the byte's columns and what is of its neighbour's.
template <int Mask>
struct Floats {
  static constexpr int kPlanes = Mask == GBLM_4_OF_8 ? 4 : 5;
  static constexpr int kSteps = 8 * kPlanes, kTokenBytes = 128;
  static constexpr int kExcess = 0;
  static constexpr bool kInteger = false, kControls = true;

  template <class Visit>
  static INLINE void block(const uint8_t* at, Visit&& visit) {
    __m256i control[2][4];
    unroll<2>([&](auto h) LAMBDA { make_controls<Mask>(load256(at + 32 * h), control[h]); });
    unroll<kSteps>([&](auto s) LAMBDA {
      constexpr int rows = s % 2, plane = s / 2 % kPlanes, byte = s / 2 / kPlanes;
      constexpr int k = smaller(plane, 3);
      const uint8_t* line = at + kMaskBytes + kLine * (2 * k + byte % 2) + 32 * rows;
      const __m256i index = _mm256_srli_epi32(control[rows][k], 8 * byte);
      __m256i value = load256(line);
      value = byte / 2 ? _mm256_and_si256(value, _mm256_set1_epi32(static_cast<int>(0xFFFF0000)))
                       : _mm256_slli_epi32(value, 16);
      if constexpr (kPlanes == 5 && k == 3) {
        const __m256i others = _mm256_srai_epi32(_mm256_slli_epi32(index, 28), 31);
        value = plane == 3 ? _mm256_andnot_si256(others, value) : _mm256_and_si256(others, value);
      }
      visit(s, index, value);
    });
  }

  template <int T>
  struct Sums {
    static constexpr int kChains = T <= 2 ? 2 : 1;  // independent sums hide the latency
    __m256 sum[2 * kChains][T];

    INLINE Sums() {
      unroll<2 * kChains * T>([&](auto i) LAMBDA { sum[i / T][i % T] = _mm256_setzero_ps(); });
    }
    template <int S>
    INLINE void add(const uint8_t* x, __m256i index, __m256i value) {
      constexpr int plane = S / 2 % kPlanes, byte = S / 2 / kPlanes ^ (plane == 4);
      unroll<T>([&](auto t) LAMBDA {
        const __m256i eight = load256(x + kTokenBytes * t + 32 * byte);
        const __m256i picked = _mm256_permutevar8x32_epi32(eight, index);
        __m256& to = sum[S % 2 + S / 2 % kChains * 2][t];
        to = _mm256_fmadd_ps((__m256)picked, (__m256)value, to);
      });
    }
    INLINE __m256 get(int half, int t) const {
      return kChains == 1 ? sum[half][t] : sum[half][t] + sum[half + 2][t];
    }
  };
};

template <int Values, int Mask>
struct Choose {
  using Planes = std::conditional_t<Values == GBLM_INT4, Codes4<Mask>, Codes8<Mask>>;
  using Codes = std::conditional_t<Mask == GBLM_DENSE, Words<Values>, Planes>;
  using Steps = std::conditional_t<Values == GBLM_BF16, Floats<Mask>, Codes>;
};

// ---- Where steps come from: the blocks of a panel, or cache. Excesses follow 64 columns.

template <class Steps>
constexpr int64_t kStepBytes = Steps::kControls ? 64 : 32;

template <class Steps>
struct FromBlocks {
  const uint8_t* at;
  int64_t bytes;  // of a block
  __m256i codes[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};

  template <class Visit>
  INLINE void block(Visit&& visit) {
    ask_ahead<true>(at, bytes);
    Steps::block(at, [&](auto s, __m256i control, __m256i value) LAMBDA {
      if constexpr (Steps::kExcess > 0) {
        __m256i& sum = codes[s % Steps::kExcess];
        sum = _mm256_add_epi8(sum, value);
      }
      visit(s, control, value);
    });
    at += bytes;
  }
  // 128 times the codes: their sums of bytes are -128 to 112.
  template <int I>
  INLINE __m256i excess() {
    const __m256i words = _mm256_maddubs_epi16(all_bytes(128), codes[I]);
    codes[I] = _mm256_setzero_si256();
    return words;
  }
};

template <class Steps>
struct FromCache {
  const uint8_t* at;

  template <class Visit>
  INLINE void block(Visit&& visit) {
    unroll<Steps::kSteps>([&](auto s) LAMBDA {
      const uint8_t* step = at + kStepBytes<Steps> * s;
      visit(s, load256(step), load256(step + kStepBytes<Steps> - 32));
    });
    at += kStepBytes<Steps> * Steps::kSteps;
  }
  template <int>
  INLINE __m256i excess() {
    at += 32;
    return load256(at - 32);
  }
};

// Whether excesses follow block b of a group.
template <class Steps>
INLINE bool ends_words(int64_t b, int64_t blocks) {
  return Steps::kExcess > 0 && (b % 2 == 1 || b + 1 == blocks);
}

template <class Steps, int T, class Source>
INLINE void add_blocks(Source& source, int64_t blocks, const uint8_t* x,
                       typename Steps::template Sums<T>& sums) {
  for (int64_t b = 0; b < blocks; b++, x += Steps::kTokenBytes * T) {
    source.block([&](auto s, __m256i control, __m256i value)
                     LAMBDA { sums.template add<s>(x, control, value); });
    if (ends_words<Steps>(b, blocks))
      unroll<Steps::kExcess>([&](auto i)
                                 LAMBDA { sums.template widen<i>(source.template excess<i>()); });
  }
}

// Scales of eight rows.
INLINE __m256 row_scales(const uint8_t* line, int half) {
  const __m256i wide = _mm256_cvtepu16_epi32(load128(line + 16 * half));
  return (__m256)_mm256_slli_epi32(wide, 16);
}

// Add the sums of a group, or of blocks of floats. The scales of rows are bf16 at `line`.
template <class Steps, int T>
INLINE void add_totals(const typename Steps::template Sums<T>& sums, const uint8_t* line,
                       const Rounding* groups, Lanes* totals) {
  unroll<2>([&](auto half) LAMBDA {
    const __m256 scales = Steps::kInteger ? row_scales(line, half) : _mm256_set1_ps(1);
    unroll<T>([&](auto t) LAMBDA {
      __m256 total = (__m256)totals[t].part[half];
      if constexpr (Steps::kInteger)
        total = _mm256_fmadd_ps(sums.get(half, t),
                                _mm256_mul_ps(scales, _mm256_set1_ps(groups[t].scale)), total);
      else
        total = _mm256_add_ps(total, sums.get(half, t));
      totals[t].part[half] = (Part)total;
    });
  });
}

// ---- Up to four tokens.

template <class Steps, int T>
bool few_tokens(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y) {
  const int64_t groups = p.group ? p.columns / p.group : 1, blocks = p.blocks / groups;
  for (int64_t panel = first; panel < last; panel++) {
    FromBlocks<Steps> source{p.whole(panel), p.block_bytes};
    if (source.at == nullptr) return false;
    Lanes totals[T] = {};
    const uint8_t *packed = static_cast<const uint8_t*>(x.packed), *line = nullptr;
    for (int64_t g = 0; g < groups; g++, packed += blocks * Steps::kTokenBytes * T) {
      if (Steps::kInteger) p.open_group(g, &source.at, &line);
      typename Steps::template Sums<T> sums;
      add_blocks<Steps, T>(source, blocks, packed, sums);
      add_totals<Steps, T>(sums, line, x.groups + g * T, totals);
    }
    store_panel(p, panel, T, totals, y);
  }
  return true;
}

// ---- More tokens: the steps of some pieces of a panel are made in cache, for all tiles.

// Some pieces in cache: each has the steps of its blocks, and for integers the line of its scales.
struct Made {
  const uint8_t* steps;
  int64_t pieces, blocks;  // of one
};

template <class Steps, int T>
void add_tile(const Made& made, const uint8_t* x, const Rounding* groups, Lanes* totals) {
  FromCache<Steps> source{made.steps};
  for (int64_t i = 0; i < made.pieces; i++) {
    typename Steps::template Sums<T> sums;
    add_blocks<Steps, T>(source, made.blocks, x, sums);
    add_totals<Steps, T>(sums, source.at, groups, totals);
    if (Steps::kInteger) source.at += 32;
    x += made.blocks * Steps::kTokenBytes * T;
    groups += T;
  }
}

template <class Steps>
class PanelTiles {
 public:
  // With the excesses of two blocks, which may be of a group of one.
  static constexpr int64_t kBlockBytes = kStepBytes<Steps> * Steps::kSteps + 32 * Steps::kExcess;

  PanelTiles(const Panels& panels, const Activations& activations, void* memory)
      : p_(panels), x_(activations), cut_(panels, kBlockBytes) {
    cache_ = static_cast<uint8_t*>(memory);
    totals_ = reinterpret_cast<Lanes*>(cache_ + kStepCache + kMaxPieces * 32);
  }

  // False when a panel is damaged.
  bool multiply(int64_t first, int64_t last, Output y) {
    for (int64_t panel = first; panel < last; panel++) {
      source_.at = p_.whole(panel);
      if (source_.at == nullptr) return false;
      std::memset(totals_, 0, static_cast<size_t>(x_.tokens) * sizeof(Lanes));
      for (int64_t piece = 0; piece < cut_.pieces; piece += cut_.together) add(piece);
      store_panel(p_, panel, x_.tokens, totals_, y);
    }
    return true;
  }

 private:
  // The pieces that fit into cache, and all tokens.
  void add(int64_t first) {
    const int64_t block = first * cut_.blocks;
    const Made made{cache_, smaller(cut_.together, cut_.pieces - first),
                    smaller(cut_.blocks, p_.blocks - block)};
    make(first, made);
    constexpr decltype(&add_tile<Steps, 1>) tiles[] = {add_tile<Steps, 1>, add_tile<Steps, 2>,
                                                       add_tile<Steps, 3>, add_tile<Steps, 4>};
    for (int64_t t = 0; t < x_.tokens; t += kTogether) {
      const int64_t n = smaller(kTogether, x_.tokens - t);
      const auto* x = static_cast<const uint8_t*>(x_.packed);
      tiles[n - 1](made, x + Steps::kTokenBytes * (t * p_.blocks + block * n),
                   x_.groups + t * cut_.pieces + first * n, totals_ + t);
    }
  }

  void make(int64_t first, const Made& made) {
    uint8_t* to = cache_;
    const auto put = [&](__m256i value) LAMBDA {
      _mm256_store_si256((__m256i*)to, value);
      to += 32;
    };
    for (int64_t i = 0; i < made.pieces; i++) {
      if (Steps::kInteger) p_.open_group(first + i, &source_.at, &line_);
      for (int64_t b = 0; b < made.blocks; b++) {
        source_.block([&](auto, __m256i control, __m256i value) LAMBDA {
          if constexpr (Steps::kControls) put(control);
          put(value);
        });
        if (ends_words<Steps>(b, made.blocks))
          unroll<Steps::kExcess>([&](auto i) LAMBDA { put(source_.template excess<i>()); });
      }
      if (Steps::kInteger) put(load256(line_));
    }
  }

  const Panels& p_;
  const Activations& x_;
  const Cut cut_;
  FromBlocks<Steps> source_{nullptr, p_.block_bytes};
  const uint8_t* line_ = nullptr;
  uint8_t* cache_;
  Lanes* totals_;  // [tokens]
};

// ---- Activations: tiles of [blocks][tokens of the tile, up to four][32 columns].

template <class X>
void pack_step_floats(const Panels& p, const X* x, int64_t tokens, float* to) {
  for (int64_t b = 0; b < p.blocks; b++)
    for (int64_t t = 0; t < tokens; t++, to += kColumns) {
      const X* from = x + t * p.columns + b * kColumns;
      const int64_t here = smaller(kColumns, p.columns - b * kColumns);
      for (int64_t k = 0; k < kColumns; k++) to[k] = k < here ? widen(from[k]) : 0;
    }
}

// The largest size in a group; as integers, those of bf16 are in order, and NaN is above all.
INLINE float largest(const uint16_t* x, int64_t count) {
  uint16_t most = 0;
  for (int64_t k = 0; k < count; k++) most = larger<uint16_t>(most, x[k] & 0x7FFF);
  return from_bf16(most);
}

// 32 activations as codes.
INLINE __m256i round_codes(const uint16_t* x, __m256 inverse) {
  __m256i code[4];
  unroll<4>([&](auto i) LAMBDA {
    const __m256i wide = _mm256_cvtepu16_epi32(load128(x + 8 * i));
    const __m256 value = (__m256)_mm256_slli_epi32(wide, 16);
    // The low bytes: packing would not cut them off but clamp, and make a number of a NaN.
    code[i] =
        _mm256_and_si256(_mm256_cvtps_epi32(_mm256_mul_ps(value, inverse)), _mm256_set1_epi32(255));
  });
  const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(code[0], code[1]),
                                            _mm256_packus_epi32(code[2], code[3]));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// For int4 + 128.
inline void pack_codes(const Panels& p, const uint16_t* x, int64_t tokens, uint8_t* to,
                       Rounding* rounding) {
  const __m256i offset = all_bytes(p.values == GBLM_INT4 ? 128 : 0);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t g = 0; g < p.columns / p.group; g++) {
      const float most = largest(x + t * p.columns + g * p.group, p.group);
      const __m256 inverse = _mm256_set1_ps(most > kLeast ? 127 / most : 0);
      rounding[g * tokens + t] = {most / 127, 0};
      for (int64_t k = g * p.group; k < (g + 1) * p.group; k += kColumns) {
        const __m256i codes = round_codes(x + t * p.columns + k, inverse);
        _mm256_storeu_si256((__m256i*)(to + k * tokens + t * kColumns),
                            _mm256_xor_si256(codes, offset));
      }
    }
}

// ---- What avx2.cpp calls.

inline int64_t step_scratch_bytes(int64_t tokens) {
  return kStepCache + kMaxPieces * 32 + tokens * static_cast<int64_t>(sizeof(Lanes));
}

template <class X>
void pack_for_steps(const Panels& p, const void* rows, int64_t tokens, int64_t tile, void* packed,
                    Rounding* groups) {
  const int64_t first = tile * kTogether, here = smaller(kTogether, tokens - first);
  const X* x = static_cast<const X*>(rows);
  const int64_t column = first * p.blocks * kColumns;
  if constexpr (std::is_same_v<X, uint16_t>)
    if (is_integer(p.values)) {
      pack_codes(p, x, here, static_cast<uint8_t*>(packed) + column,
                 groups + first * (p.columns / p.group));
      return;
    }
  pack_step_floats(p, x, here, static_cast<float*>(packed) + column);
}

template <int Values, int Mask>
bool multiply_steps(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                    void* scratch) {
  using With = typename Choose<Values, Mask>::Steps;
  if (x.tokens == 1) return few_tokens<With, 1>(p, x, first, last, y);
  if (x.tokens == 2) return few_tokens<With, 2>(p, x, first, last, y);
  // More are faster from cache; of floats, whose steps are large, only more than a tile.
  if constexpr (!With::kInteger) {
    if (x.tokens == 3) return few_tokens<With, 3>(p, x, first, last, y);
    if (x.tokens == 4) return few_tokens<With, 4>(p, x, first, last, y);
  }
  return PanelTiles<With>(p, x, scratch).multiply(first, last, y);
}

}  // namespace
