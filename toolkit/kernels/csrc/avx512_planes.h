// AVX-512: blocks of planes. A shuffle picks the activation of each kept weight, so that weights
// which are gone are neither expanded nor multiplied: 64 kept codes are 128 columns, and one dot
// product.
//
// A step is one register of kept weights and the control that picks their activations: a plane of
// integers, a line of bf16, 16 weights for float32 activations. Steps are made from Panels::mask
// and the planes; all tokens share them.
#pragma once

#include "avx512_expand.h"
#include "avx512_pack.h"

namespace {

// Where the k-th kept column of a byte of mask is, by its low seven bits: with three to five kept
// no other than the last can be column 7, and it is where the first seven have fewer.
struct Ranks {
  alignas(64) uint8_t column[5][128] = {};

  constexpr Ranks() {
    for (int bits = 0; bits < 128; bits++) {
      int k = 0;
      for (int i = 0; i < 7 && k < 5; i++)
        if (bits >> i & 1) column[k++][bits] = static_cast<uint8_t>(i);
      while (k < 5) column[k++][bits] = 7;
      column[4][bits] ^= 8;  // it is the neighbour that keeps it
    }
  }
};
constexpr Ranks kRanks;

// The controls of a plane: a byte of it says which of 32 columns its weight belongs to. Whatever
// the masks are, there is such a column.
template <int Mask>
struct Controls {
  static constexpr int kTables = Mask == GBLM_4_OF_8 ? 4 : 5;
  __m512i low[kTables], high[kTables], first = _mm512_set1_epi32(0x18100800);

  INLINE Controls() {
    unroll<kTables>([&](auto k) LAMBDA {
      low[k] = load512(kRanks.column[k]), high[k] = load512(kRanks.column[k] + 64);
    });
  }
  template <int K>
  INLINE __m512i plane(__m512i masks) const {
    __m512i column = _mm512_permutex2var_epi8(low[K], masks, high[K]);
    if constexpr (Mask == GBLM_8_OF_16 && K == 3) {
      const __m512i neighbours = _mm512_shldi_epi16(masks, masks, 8);
      const __m512i fifth = _mm512_permutex2var_epi8(low[4], neighbours, high[4]);
      const __mmask64 own = _mm512_cmpgt_epi8_mask(_mm512_popcnt_epi8(masks), _mm512_set1_epi8(3));
      column = _mm512_mask_blend_epi8(own, fifth, column);
    }
    return _mm512_xor_si512(column, first);
  }
};

// Steps of integers: activations are 32 bytes of a block.
template <int Values>
struct Codes {
  using Sum = Ints;
  static constexpr int kSteps = 4, kTokenBytes = 32;
  static constexpr bool kNibbles = Values == GBLM_INT4;
  static constexpr int kShift = kNibbles ? 4 : 0;  // of codes with a sign

  // + 8 or + 128; of odd planes of int4 16 times.
  template <int S>
  static INLINE __m512i plain(const uint8_t* planes) {
    if constexpr (!kNibbles) return load512(planes + kLine * S);
    const __m512i nibbles = _mm512_set1_epi8(static_cast<char>(S % 2 ? 0xF0 : 0x0F));
    return _mm512_and_si512(load512(planes + kLine * (S / 2)), nibbles);
  }
  // With their sign; of int4 16 times.
  template <int S>
  static INLINE __m512i value(const uint8_t* planes) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    if constexpr (!kNibbles) return _mm512_xor_si512(load512(planes + kLine * S), sign);
    __m512i codes = load512(planes + kLine * (S / 2));
    if constexpr (S % 2 == 0) codes = _mm512_slli_epi16(codes, 4);
    const __m512i high = _mm512_set1_epi8(static_cast<char>(0xF0));
    return _mm512_ternarylogic_epi64(codes, high, sign, 0x6A);  // codes & high ^ sign
  }
  template <int S>
  static INLINE __m512i control(__m512i plane) {
    return plane;
  }
  // What is above 32 bytes is never picked.
  template <int S>
  static INLINE __m512i pick(const uint8_t* x, __m512i control) {
    return _mm512_permutexvar_epi8(control, load256(x));
  }
  static INLINE Sum dot(Sum sum, __m512i without_sign, __m512i with_sign) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, without_sign, with_sign);
  }
};

// Steps of bf16: 64 bytes of activations of a block.
struct Halves {
  using Sum = __m512;
  static constexpr int kSteps = 8, kTokenBytes = 64, kShift = 0;

  template <int S>
  static INLINE __m512i value(const uint8_t* planes) {
    return load512(planes + kLine * S);
  }
  // The shuffle looks at the low five bits of a half.
  template <int S>
  static INLINE __m512i control(__m512i plane) {
    return S % 2 ? _mm512_srli_epi16(plane, 8) : plane;
  }
  template <int S>
  static INLINE __m512i pick(const uint8_t* x, __m512i control) {
    return _mm512_permutexvar_epi16(control, load512(x));
  }
  static INLINE Sum dot(Sum sum, __m512i picked, __m512i value) {
    return _mm512_dpbf16_ps(sum, (__m512bh)value, (__m512bh)picked);
  }
};

// Steps of bf16 weights and float32 activations, 128 bytes of a block: bytes 0, 2, 1, 3 of the
// masks, as two lines of a plane have them.
struct Floats {
  using Sum = __m512;
  static constexpr int kSteps = 16, kTokenBytes = 128, kShift = 0;

  template <int S>
  static INLINE __m512i value(const uint8_t* planes) {
    const __m512i pairs = load512(planes + kLine * (S / 2));
    return S % 2 ? _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)))
                 : _mm512_slli_epi32(pairs, 16);
  }
  template <int S>
  static INLINE __m512i control(__m512i plane) {
    return _mm512_srli_epi32(plane, S % 2 * 16 + S / 2 % 2 * 8);
  }
  // The shuffle looks at the low four bits: columns 0 to 15, or 16 to 31.
  template <int S>
  static INLINE __m512i pick(const uint8_t* x, __m512i control) {
    return _mm512_permutexvar_epi32(control, load512(x + S % 2 * 64));
  }
  static INLINE Sum dot(Sum sum, __m512i picked, __m512i value) {
    return _mm512_fmadd_ps((__m512)value, (__m512)picked, sum);
  }
};

// ---- Up to 16 tokens: x is [blocks][M][32 columns].

// Sums of rows: with many tokens in memory that the compiler cannot see into; it would spill those
// of the inner loop instead.
template <int M>
struct Totals {
  alignas(64) float memory[M][16];
  float* at = memory[0];
  INLINE Totals() {
    forget();
    asm("" : "+r"(at));
    unroll<M>([&](auto m) LAMBDA { _mm512_store_ps(at + 16 * m, _mm512_setzero_ps()); });
  }
  INLINE void add(int m, __m512 sum, __m512 scale) {
    float* to = at + 16 * m;
    _mm512_store_ps(to, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(to)));
  }
  INLINE __m512 get(int m) const { return _mm512_load_ps(at + 16 * m); }
};

// The sums of one group. Of one token, codes without a sign meet activations with one, and 8 or
// 128 times the picked activations are too much; of more, activations + 128 meet codes with a sign,
// and 128 times the codes are too much, for all tokens alike.
template <class Steps, int Mask, int M, bool Ask>
INLINE const uint8_t* integer_group(const Controls<Mask>& controls, const uint8_t* at,
                                    int64_t blocks, const uint8_t* x, Ints (&sums)[M]) {
  constexpr int chains = M <= 8 ? 2 : 1;  // independent sums hide the latency
  constexpr int corrections = M <= 4 ? 4 : chains;
  constexpr int together = 4;  // steps that are in registers at once
  constexpr int64_t bytes = kMaskBytes + (Steps::kNibbles ? 2 : 4) * kLine;
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  Ints sum[M * chains], excess[corrections];
  unroll<M * chains>([&](auto i) LAMBDA { sum[i] = Ints{}; });
  unroll<corrections>([&](auto i) LAMBDA { excess[i] = Ints{}; });
  for (int64_t b = 0; b < blocks; b++, at += bytes, x += 32 * M) {
    ask_ahead<Ask>(at, bytes);
    const __m512i masks = load512(at);
    const uint8_t* planes = at + kMaskBytes;
    unroll<4 / together>([&](auto part) LAMBDA {
      if constexpr (together < 4) forget();
      __m512i control[together], code[together];
      unroll<together>([&](auto j) LAMBDA {
        constexpr int S = part * together + j;
        control[j] = controls.template plane<S>(masks);
        if constexpr (M > 1) {
          code[j] = Steps::template value<S>(planes);
          excess[S % corrections] = Steps::dot(excess[S % corrections], offset, code[j]);
        } else {
          code[j] = Steps::template plain<S>(planes);
        }
      });
      unroll<M>([&](auto m) LAMBDA {
        unroll<together>([&](auto j) LAMBDA {
          constexpr int S = part * together + j;
          const __m512i picked = Steps::template pick<S>(x + 32 * m, control[j]);
          Ints& to = sum[m * chains + S % chains];
          if constexpr (M > 1) {
            to = Steps::dot(to, picked, code[j]);
          } else {
            to = Steps::dot(to, code[j], picked);
            excess[S] = Steps::dot(excess[S], offset, picked);
          }
        });
      });
    });
  }
  unroll<corrections - 1>([&](auto i) LAMBDA { excess[0] += excess[i + 1]; });
  unroll<M>([&](auto m) LAMBDA {
    Ints total = sum[m * chains];  // of one token and int4: the low nibbles
    if constexpr (M == 1 && Steps::kNibbles) total <<= 4;
    unroll<chains - 1>([&](auto c) LAMBDA { total += sum[m * chains + c + 1]; });
    sums[m] = total - excess[0];
  });
  return at;
}

template <class Steps, int Mask, int M, bool Ask>
INLINE void integer_planes(const Panels& p, const uint8_t* at, const uint8_t* x,
                           const Rounding* groups, Totals<M>& totals) {
  const Controls<Mask> controls;
  const int64_t blocks = p.group / kColumns;
  const uint8_t* line = nullptr;
  for (int64_t g = 0; g < p.columns / p.group; g++, groups += M, x += p.group * M) {
    p.open_group(g, &at, &line);
    Ints sums[M];
    at = integer_group<Steps, Mask, M, Ask>(controls, at, blocks, x, sums);
    const __m512 scale = group_scales<Steps::kShift>(line);
    unroll<M>([&](auto m) LAMBDA {
      totals.add(m, _mm512_cvtepi32_ps((__m512i)sums[m]),
                 _mm512_mul_ps(scale, _mm512_set1_ps(groups[m].scale)));
    });
  }
}

template <class Steps, int Mask, int M, bool Ask>
INLINE void float_planes(const Panels& p, const uint8_t* at, const uint8_t* x, Totals<M>& totals) {
  constexpr int chains = M <= 2 ? 4 : M <= 8 ? 2 : 1, steps = Steps::kSteps, each = steps / 4;
  constexpr int together = 4;
  const Controls<Mask> controls;
  __m512 sum[M * chains];
  unroll<M * chains>([&](auto i) LAMBDA { sum[i] = _mm512_setzero_ps(); });
  for (int64_t b = 0; b < p.blocks; b++, x += Steps::kTokenBytes * M) {
    ask_ahead<Ask>(at, kMaskBytes + 8 * kLine);
    const __m512i masks = load512(at);
    const uint8_t* planes = at + kMaskBytes;
    at = planes + 8 * kLine;
    unroll<steps / together>([&](auto part) LAMBDA {
      forget();
      __m512i control[together], value[together];
      unroll<together>([&](auto j) LAMBDA {
        constexpr int S = part * together + j;
        control[j] = Steps::template control<S>(controls.template plane<S / each>(masks));
        value[j] = Steps::template value<S>(planes);
      });
      unroll<M>([&](auto m) LAMBDA {
        unroll<together>([&](auto j) LAMBDA {
          constexpr int S = part * together + j;
          __m512& to = sum[m * chains + S % chains];
          to = Steps::dot(to, Steps::template pick<S>(x + Steps::kTokenBytes * m, control[j]),
                          value[j]);
        });
      });
    });
  }
  unroll<M>([&](auto m) LAMBDA {
    __m512 total = sum[m * chains];
    unroll<chains - 1>([&](auto c) LAMBDA { total += sum[m * chains + c + 1]; });
    totals.add(m, total, _mm512_set1_ps(1));
  });
}

template <class Steps, int Mask, int M, bool Ask>
bool few_planes(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y) {
  const auto* packed = static_cast<const uint8_t*>(x.packed);
  for (int64_t panel = first; panel < last; panel++) {
    const uint8_t* at = p.whole(panel);
    if (at == nullptr) return false;
    Totals<M> totals;
    if constexpr (Steps::kSteps == 4)
      integer_planes<Steps, Mask, M, Ask>(p, at, packed, x.groups, totals);
    else
      float_planes<Steps, Mask, M, Ask>(p, at, packed, totals);
    unroll<M>([&](auto m) LAMBDA {
      if (m < x.tokens) store_rows(p, panel, totals.get(m), y.from(m, p));
    });
  }
  return true;
}

// ---- More tokens: the steps of two panels are made in cache, some columns at a time.

constexpr int64_t kStepBytes = 2 * kLine;  // a control and a value

// Some blocks of two panels: a group, or what fits.
struct Piece {
  const uint8_t* steps[2];
  Ints minus[2];  // what sums begin with, of integers
  __m512 scales[2];
};

template <class Steps, int T>
void piece_tile(const Piece& piece, int64_t blocks, const uint8_t* x, const Rounding* groups,
                float* sums) {
  constexpr bool integers = Steps::kSteps == 4;
  using Sum = typename Steps::Sum;
  Sum a[T], b[T];
  unroll<T>([&](auto t) LAMBDA {
    if constexpr (integers)
      a[t] = piece.minus[0], b[t] = piece.minus[1];
    else
      a[t] = b[t] = _mm512_setzero_ps();
  });
  const uint8_t *w0 = piece.steps[0], *w1 = piece.steps[1];
  for (int64_t i = 0; i < blocks; i++, x += Steps::kTokenBytes * T)
    unroll<Steps::kSteps>([&](auto s) LAMBDA {
      forget();
      const __m512i control0 = load512(w0), value0 = load512(w0 + kLine);
      const __m512i control1 = load512(w1), value1 = load512(w1 + kLine);
      w0 += kStepBytes, w1 += kStepBytes;
      unroll<T>([&](auto t) LAMBDA {
        const uint8_t* from = x + Steps::kTokenBytes * t;
        a[t] = Steps::dot(a[t], Steps::template pick<s>(from, control0), value0);
        b[t] = Steps::dot(b[t], Steps::template pick<s>(from, control1), value1);
      });
    });
  unroll<T>([&](auto t) LAMBDA {
    const Sum both[2] = {a[t], b[t]};
    unroll<2>([&](auto i) LAMBDA {
      float* to = sums + 2 * kRows * t + kRows * i;
      __m512 sum;
      if constexpr (integers)
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)both[i]),
                              _mm512_mul_ps(piece.scales[i], _mm512_set1_ps(groups[t].scale)),
                              _mm512_load_ps(to));
      else
        sum = both[i] + _mm512_load_ps(to);
      _mm512_store_ps(to, sum);
    });
  });
}
template <class Steps>
constexpr decltype(&piece_tile<Steps, 1>) kPieceTiles[] = {
    piece_tile<Steps, 1>, piece_tile<Steps, 2>,  piece_tile<Steps, 3>,  piece_tile<Steps, 4>,
    piece_tile<Steps, 5>, piece_tile<Steps, 6>,  piece_tile<Steps, 7>,  piece_tile<Steps, 8>,
    piece_tile<Steps, 9>, piece_tile<Steps, 10>, piece_tile<Steps, 11>, piece_tile<Steps, 12>};

// Write the steps of some blocks; returns where they end.
template <class Steps, int Mask>
INLINE const uint8_t* make_steps(const Controls<Mask>& controls, const uint8_t* at, int64_t blocks,
                                 int64_t block_bytes, uint8_t* to, Ints* minus) {
  Ints excess{};
  for (int64_t b = 0; b < blocks; b++, at += block_bytes) {
    ask_ahead<true>(at, block_bytes);
    const __m512i masks = load512(at);
    unroll<4>([&](auto k) LAMBDA {
      constexpr int each = Steps::kSteps / 4;
      const __m512i plane = controls.template plane<k>(masks);
      unroll<each>([&](auto j) LAMBDA {
        constexpr int S = k * each + j;
        const __m512i value = Steps::template value<S>(at + kMaskBytes);
        _mm512_store_si512(to, Steps::template control<S>(plane));
        _mm512_store_si512(to + kLine, value);
        to += kStepBytes;
        if constexpr (each == 1)
          excess = Steps::dot(excess, _mm512_set1_epi8(static_cast<char>(0x80)), value);
      });
    });
  }
  *minus = -excess;
  return at;
}

template <class Steps, int Mask>
class PlanePair {
 public:
  PlanePair(const Panels& panels, const Activations& activations, void* memory)
      : p_(panels),
        x_(activations),
        cut_(panels, kBlockBytes),
        width_(tile_width(activations.tokens)) {
    cache_ = static_cast<uint8_t*>(memory);
    sums_ = reinterpret_cast<float*>(cache_ + 2 * kStepCache);
  }

  // False when a panel is damaged. The last one may be alone: it comes twice.
  bool multiply(int64_t first, int64_t last, Output y) {
    for (int64_t panel = first; panel < last; panel += 2) {
      for (int i = 0; i < 2; i++) {
        at_[i] = p_.whole(smaller(panel + i, last - 1));
        if (at_[i] == nullptr) return false;
      }
      std::memset(sums_, 0, static_cast<size_t>(x_.tokens) * 2 * kRows * sizeof(float));
      for (int64_t piece = 0; piece < cut_.pieces; piece += cut_.together)
        add(piece, smaller(cut_.together, cut_.pieces - piece));
      for (int64_t t = 0; t < x_.tokens; t++)
        for (int64_t i = 0; i < smaller<int64_t>(2, last - panel); i++)
          store_rows(p_, panel + i, _mm512_load_ps(sums_ + (2 * t + i) * kRows), y.from(t, p_));
    }
    return true;
  }

 private:
  int64_t blocks_of(int64_t piece) const {
    return smaller(cut_.blocks, p_.blocks - piece * cut_.blocks);
  }

  // Some pieces and all tokens.
  void add(int64_t first, int64_t count) {
    Piece pieces[kMaxPieces];
    for (int i = 0; i < 2; i++) fill(i, first, count, pieces);
    const auto* packed = static_cast<const uint8_t*>(x_.packed);
    for (int64_t t = 0; t < x_.tokens; t += width_) {
      const int64_t n = smaller(width_, x_.tokens - t);
      for (int64_t j = 0; j < count; j++) {
        const int64_t block = (first + j) * cut_.blocks;
        kPieceTiles<Steps>[n - 1](pieces[j], blocks_of(first + j),
                                  packed + Steps::kTokenBytes * (t * p_.blocks + block * n),
                                  x_.groups + t * cut_.pieces + (first + j) * n,
                                  sums_ + t * 2 * kRows);
      }
    }
  }

  void fill(int i, int64_t first, int64_t count, Piece* pieces) {
    uint8_t* to = cache_ + i * kStepCache;
    for (int64_t j = 0; j < count; j++) {
      Piece& piece = pieces[j];
      if (p_.group) {
        p_.open_group(first + j, &at_[i], &line_[i]);
        piece.scales[i] = group_scales<Steps::kShift>(line_[i]);
      }
      piece.steps[i] = to;
      at_[i] = make_steps<Steps>(controls_, at_[i], blocks_of(first + j), p_.block_bytes, to,
                                 &piece.minus[i]);
      to += cut_.blocks * kBlockBytes;
    }
  }

  static constexpr int64_t kBlockBytes = Steps::kSteps * kStepBytes;
  const Panels& p_;
  const Activations& x_;
  const Controls<Mask> controls_;
  const Cut cut_;
  const int64_t width_;
  const uint8_t *at_[2], *line_[2];
  uint8_t* cache_;
  float* sums_;  // [tokens][2 * 16 rows]
};

// ---- Activations: tiles of [blocks][tokens of the tile][32 columns].

// One tile of bf16 or float32; what is missing is zero.
template <class Steps>
void pack_plane_floats(const Panels& p, const void* source, int64_t tokens, int64_t width,
                       void* packed) {
  const int64_t row = p.columns * Steps::kTokenBytes / kColumns;
  auto* to = static_cast<uint8_t*>(packed);
  for (int64_t b = 0; b < p.blocks; b++)
    for (int64_t t = 0; t < width; t++, to += Steps::kTokenBytes) {
      const auto* from = static_cast<const uint8_t*>(source) + t * row + b * Steps::kTokenBytes;
      const int64_t here =
          t < tokens ? smaller<int64_t>(Steps::kTokenBytes, row - b * Steps::kTokenBytes) : 0;
      std::memcpy(to, from, static_cast<size_t>(here));
      std::memset(to + here, 0, static_cast<size_t>(Steps::kTokenBytes - here));
    }
}

// One tile of codes: of one token with a sign, of more + 128.
void pack_plane_integers(const Panels& p, const uint16_t* x, int64_t tokens, int64_t width,
                         bool alone, uint8_t* to, Rounding* rounding) {
  const __m128i offset = _mm_set1_epi8(static_cast<char>(alone ? 0 : 0x80));
  for (int64_t t = 0; t < width; t++)
    for (int64_t g = 0; g < p.columns / p.group; g++) {
      const uint16_t* row = x + smaller(t, tokens - 1) * p.columns + g * p.group;
      const float most = largest(row, p.group);
      const __m512 inverse = inverse_scale(most);
      rounding[g * width + t] = {most / 127, 0};
      for (int64_t k = 0; k < p.group; k += 16) {
        const int64_t column = g * p.group + k;
        uint8_t* at = to + (column / kColumns * width + t) * kColumns + column % kColumns;
        const __m128i codes = _mm512_cvtepi32_epi8(round_codes(row + k, inverse));
        _mm_storeu_si128((__m128i*)at, _mm_xor_si128(codes, offset));
      }
    }
}

// ---- The choice among all of these.

template <class Steps, int Mask, bool Ask>
bool few_planes(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y) {
  switch (tile_width(x.tokens)) {
    case 1:
      return few_planes<Steps, Mask, 1, Ask>(p, x, first, last, y);
    case 2:
      return few_planes<Steps, Mask, 2, Ask>(p, x, first, last, y);
    case 3:
      return few_planes<Steps, Mask, 3, Ask>(p, x, first, last, y);
    case 4:
      return few_planes<Steps, Mask, 4, Ask>(p, x, first, last, y);
    case 6:
      return few_planes<Steps, Mask, 6, Ask>(p, x, first, last, y);
    case 8:
      return few_planes<Steps, Mask, 8, Ask>(p, x, first, last, y);
    case 12:
      return few_planes<Steps, Mask, 12, Ask>(p, x, first, last, y);
    default:
      return few_planes<Steps, Mask, 16, Ask>(p, x, first, last, y);
  }
}

template <class Steps, int Mask>
bool multiply_planes(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                     void* scratch) {
  if (x.tokens > kMaxDecode) return PlanePair<Steps, Mask>(p, x, scratch).multiply(first, last, y);
  if (x.tokens == 1 && kOnZen4) return few_planes<Steps, Mask, 1, false>(p, x, first, last, y);
  return few_planes<Steps, Mask, true>(p, x, first, last, y);
}

}  // namespace
