// ARM64: blocks of planes. Table lookups pick the activation of each kept weight, so that weights
// which are gone are neither expanded nor multiplied.
//
// A step is 16 kept weights, a plane of four rows, and the control that picks their activations;
// all tokens share it. Activations of a block lie byte by byte: the first bytes of its 32 columns,
// their second ones and so on, because a lookup in two registers reaches no further.
// Sums are scaled and stored as Columns does it: integers are those of the portable kernels.
#pragma once

#include <arm_neon.h>

#include "columns.h"
#include "planes.h"

namespace {

// The controls of four rows, plane after plane: which of 32 columns a weight belongs to. Whatever
// the masks are, there is such a column. Tables of 128 bytes a plane would fill all registers.
template <int Mask>
class Controls {
 public:
  explicit INLINE Controls(uint8x16_t masks) : bits_(masks) {}

  template <int K>
  INLINE uint8x16_t next() {
    const uint8x16_t left = bits_;
    uint8x16_t column = take();
    if constexpr (Mask == GBLM_8_OF_16 && K == 3) {
      // A byte without a fourth column has its neighbour's fifth.
      const uint8x16_t fifth = veorq_u8(vrev16q_u8(take()), vdupq_n_u8(8));
      column = vbslq_u8(vtstq_u8(left, left), column, fifth);
    }
    return veorq_u8(column, vreinterpretq_u8_u32(vdupq_n_u32(0x18100800)));
  }

 private:
  // The lowest column of each byte; 8 where none is left.
  INLINE uint8x16_t take() {
    const uint8x16_t below = vsubq_u8(bits_, vdupq_n_u8(1));
    const uint8x16_t column = vcntq_u8(vbicq_u8(below, bits_));
    bits_ = vandq_u8(bits_, below);
    return column;
  }

  uint8x16_t bits_;
};

INLINE uint8x16_t pick(const uint8_t* x, uint8x16_t control) {
  return vqtbl2q_u8(vld1q_u8_x2(x), control);
}

// Integers: codes with a sign.
template <int Values>
struct Codes {
  using Sum = int32x4_t;
  static constexpr int kValues = Values;
  static constexpr int64_t kTokenBytes = kColumns;
  struct Step {
    uint8x16_t control;
    int8x16_t codes;
  };

  // Plane K of the rows 4 Q to 4 Q + 3.
  template <int Q, int K>
  static INLINE Step make(uint8x16_t control, const uint8_t* planes) {
    if constexpr (Values == GBLM_INT8) {
      const uint8x16_t codes = vld1q_u8(planes + kLine * K + 16 * Q);
      return {control, vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0x80)))};
    } else {
      const uint8x16_t both = vld1q_u8(planes + kLine * (K / 2) + 16 * Q);
      const uint8x16_t codes = K % 2 ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
      return {control, vsubq_s8(vreinterpretq_s8_u8(codes), vdupq_n_s8(8))};
    }
  }
  static INLINE Sum add(Sum sum, const Step& step, const uint8_t* x) {
    return vdotq_s32(sum, step.codes, vreinterpretq_s8_u8(pick(x, step.control)));
  }
  static INLINE Part widen(Sum sum) { return (Part)vcvtq_f32_s32(sum); }
};

// Of bf16 a step has two lines: bytes 0 and 2 of the rows' masks, and bytes 1 and 3.
struct Pairs {
  using Sum = float32x4_t;
  static constexpr int kValues = GBLM_BF16;
  struct Step {
    uint8x16_t control, even, odd;
  };

  template <int Q, int K>
  static INLINE Step make(uint8x16_t control, const uint8_t* planes) {
    const uint8_t* at = planes + kLine * 2 * K + 16 * Q;
    return {control, vld1q_u8(at), vld1q_u8(at + kLine)};
  }
  static INLINE Part widen(Sum sum) { return (Part)sum; }

  // The two halves of each row as float32.
  static INLINE float32x4_t low(uint8x16_t pairs) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(pairs), 16));
  }
  static INLINE float32x4_t high(uint8x16_t pairs) {
    const uint32x4_t bits = vandq_u32(vreinterpretq_u32_u8(pairs), vdupq_n_u32(0xFFFF0000));
    return vreinterpretq_f32_u32(bits);
  }
};

// bf16 activations, multiplied in float32.
struct Widened {
  static INLINE float32x4_t add(float32x4_t sum, uint8x16_t weights, uint8x16_t picked) {
    sum = vfmaq_f32(sum, Pairs::low(weights), Pairs::low(picked));
    return vfmaq_f32(sum, Pairs::high(weights), Pairs::high(picked));
  }
};
template <class Dot>
struct Halves : Pairs {
  static constexpr int64_t kTokenBytes = 2 * kColumns;

  static INLINE Sum add(Sum sum, const Step& step, const uint8_t* x) {
    const uint8x16_t first = pick(x, step.control), second = pick(x + kColumns, step.control);
    sum = Dot::add(sum, step.even, vtrn1q_u8(first, second));
    return Dot::add(sum, step.odd, vtrn2q_u8(first, second));
  }
};

// float32 activations: what was picked byte by byte becomes halves, then floats.
struct Floats : Pairs {
  static constexpr int64_t kTokenBytes = 4 * kColumns;

  static INLINE Sum add(Sum sum, const Step& step, const uint8_t* x) {
    uint8x16_t byte[4];
    unroll<4>([&](auto i) LAMBDA { byte[i] = pick(x + kColumns * i, step.control); });
    sum = add_line(sum, step.even, vtrn1q_u8(byte[0], byte[1]), vtrn1q_u8(byte[2], byte[3]));
    return add_line(sum, step.odd, vtrn2q_u8(byte[0], byte[1]), vtrn2q_u8(byte[2], byte[3]));
  }
  static INLINE Sum add_line(Sum sum, uint8x16_t weights, uint8x16_t lower, uint8x16_t upper) {
    const uint16x8_t a = vreinterpretq_u16_u8(lower), b = vreinterpretq_u16_u8(upper);
    sum = vfmaq_f32(sum, low(weights), vreinterpretq_f32_u16(vtrn1q_u16(a, b)));
    return vfmaq_f32(sum, high(weights), vreinterpretq_f32_u16(vtrn2q_u16(a, b)));
  }
};

constexpr int kQuarters = 4, kPlanes = 4;  // of a block: four rows, four planes of them

// Visit the steps of a block: visit(quarter, plane, step). Returns where the block ends.
template <class Steps, int Mask, class Visit>
INLINE const uint8_t* visit_steps(const uint8_t* at, Visit&& visit) {
  unroll<kQuarters>([&](auto q) LAMBDA {
    Controls<Mask> controls(vld1q_u8(at + 16 * q));
    unroll<kPlanes>([&](auto k) LAMBDA {
      const uint8x16_t control = controls.template next<k>();
      visit(q, k, Steps::template make<q, k>(control, at + kMaskBytes));
    });
  });
  return at + block_size(Steps::kValues, Mask);
}

// The products of a step and T tokens; to(t) is the sum of token t.
template <class Steps, int T, class To>
INLINE void multiply_step(const typename Steps::Step& step, const uint8_t* x, To&& to) {
  if constexpr (Steps::kValues == GBLM_BF16) forget();
  unroll<T>([&](auto t) LAMBDA { to(t) = Steps::add(to(t), step, x + Steps::kTokenBytes * t); });
}

// The scales of a group.
INLINE Lanes read_scales(const uint8_t* line) {
  Lanes scales;
  for (int i = 0; i < kParts; i++) {
    const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(line + 8 * i));
    scales.part[i] = (Part)vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
  }
  return scales;
}

// What Columns::add does, so that integers are scaled and rounded alike.
template <class Steps, int T>
INLINE void add_sums(const Lanes (&sums)[T], const uint8_t* line, const Rounding* rounding,
                     int64_t groups, Lanes* totals) {
  if constexpr (Steps::kValues == GBLM_BF16) {
    for (int t = 0; t < T; t++) totals[t] += sums[t];
  } else {
    const Lanes scales = read_scales(line);
    for (int t = 0; t < T; t++) totals[t] += sums[t] * (scales * rounding[t * groups].scale);
  }
}

inline int64_t count_groups(const Panels& p) { return p.group ? p.columns / p.group : 0; }

// ---- One or two tokens: a step is used as soon as it is there. x is [blocks][T][32 columns].

template <class Steps, int Mask, int T>
INLINE const uint8_t* multiply_blocks(const uint8_t* at, int64_t blocks, const uint8_t* x,
                                      Lanes (&sums)[T]) {
  constexpr int chains = 2 / T;  // independent sums hide the latency
  typename Steps::Sum sum[T][kQuarters][chains];
  unroll<T * kQuarters * chains>([&](auto i) LAMBDA {
    sum[i / chains / kQuarters][i / chains % kQuarters][i % chains] = typename Steps::Sum{};
  });
  for (; blocks > 0; blocks--, x += Steps::kTokenBytes * T)
    at = visit_steps<Steps, Mask>(at, [&](auto q, auto k, const typename Steps::Step& step) LAMBDA {
      if constexpr (k == 0) forget();
      multiply_step<Steps, T>(step, x,
                              [&](auto t) LAMBDA -> auto& { return sum[t][q][k % chains]; });
    });
  unroll<T * kQuarters>([&](auto i) LAMBDA {
    auto& parts = sum[i / kQuarters][i % kQuarters];
    if constexpr (chains == 2) parts[0] += parts[1];
    sums[i / kQuarters].part[i % kQuarters] = Steps::widen(parts[0]);
  });
  return at;
}

template <class Steps, int Mask, int T>
bool few_tokens(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y) {
  const int64_t step = p.group ? p.group / kColumns : p.blocks;
  for (int64_t panel = first; panel < last; panel++) {
    const uint8_t *at = p.whole(panel), *line = nullptr;
    if (at == nullptr) return false;
    const auto* packed = static_cast<const uint8_t*>(x.packed);
    Lanes totals[T] = {};
    for (int64_t block = 0; block < p.blocks; block += step) {
      if (p.group) p.open_group(block / step, &at, &line);
      Lanes sums[T];
      at = multiply_blocks<Steps, Mask, T>(at, step, packed, sums);
      add_sums<Steps, T>(sums, line, x.groups + block / step, count_groups(p), totals);
      packed += step * T * Steps::kTokenBytes;
    }
    store_panel(p, panel, T, totals, y);
  }
  return true;
}

// ---- More tokens: the steps of some blocks are made once, then tiles of tokens pass by.

constexpr int64_t kTile = 4;
constexpr int64_t kPieceBlocks = kMaxGroup / kColumns;

// A group, or what fits. Steps are [4 quarters][blocks][4 planes].
template <class Steps>
struct Piece {
  const typename Steps::Step* steps;
  int64_t blocks, groups;
  const uint8_t* line;
};

// Four rows and T tokens.
template <class Steps, int T>
INLINE void multiply_quarter(const typename Steps::Step* step, int64_t blocks, const uint8_t* x,
                             Part* (&sums)[T]) {
  constexpr int chains = larger(1, 4 / T);
  typename Steps::Sum sum[T][chains];
  unroll<T * chains>([&](auto i) LAMBDA { sum[i / chains][i % chains] = typename Steps::Sum{}; });
  for (; blocks > 0; blocks--, step += kPlanes, x += Steps::kTokenBytes * T)
    unroll<kPlanes>([&](auto k) LAMBDA {
      multiply_step<Steps, T>(step[k], x,
                              [&](auto t) LAMBDA -> auto& { return sum[t][k % chains]; });
    });
  unroll<T>([&](auto t) LAMBDA {
    unroll<chains - 1>([&](auto i) LAMBDA { sum[t][0] += sum[t][i + 1]; });
    *sums[t] = Steps::widen(sum[t][0]);
  });
}

template <class Steps, int T>
void multiply_tile(const Piece<Steps>& piece, const uint8_t* x, const Rounding* rounding,
                   Lanes* totals) {
  Lanes sums[T];
  for (int q = 0; q < kQuarters; q++) {
    Part* parts[T];
    for (int t = 0; t < T; t++) parts[t] = &sums[t].part[q];
    multiply_quarter<Steps, T>(piece.steps + q * piece.blocks * kPlanes, piece.blocks, x, parts);
  }
  add_sums<Steps, T>(sums, piece.line, rounding, piece.groups, totals);
}
template <class Steps>
constexpr decltype(&multiply_tile<Steps, 1>) kTiles[kTile] = {
    multiply_tile<Steps, 1>, multiply_tile<Steps, 2>, multiply_tile<Steps, 3>,
    multiply_tile<Steps, 4>};

template <class Steps, int Mask>
const uint8_t* make_steps(const uint8_t* at, int64_t blocks, typename Steps::Step* to) {
  for (int64_t b = 0; b < blocks; b++)
    at = visit_steps<Steps, Mask>(at, [&](auto q, auto k, const typename Steps::Step& step)
                                          LAMBDA { to[(q * blocks + b) * kPlanes + k] = step; });
  return at;
}

inline int64_t planes_scratch_bytes(int64_t tokens) {
  return tokens * static_cast<int64_t>(sizeof(Lanes)) +
         kPieceBlocks * kQuarters * kPlanes * static_cast<int64_t>(sizeof(Pairs::Step));
}

template <class Steps, int Mask>
bool many_tokens(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                 void* scratch) {
  Lanes* const totals = static_cast<Lanes*>(scratch);
  auto* const steps = reinterpret_cast<typename Steps::Step*>(totals + x.tokens);
  const auto* packed = static_cast<const uint8_t*>(x.packed);
  const int64_t step = p.group ? p.group / kColumns : kPieceBlocks, groups = count_groups(p);
  for (int64_t panel = first; panel < last; panel++) {
    const uint8_t *at = p.whole(panel), *line = nullptr;
    if (at == nullptr) return false;
    std::memset(totals, 0, static_cast<size_t>(x.tokens) * sizeof(Lanes));
    for (int64_t block = 0; block < p.blocks; block += step) {
      if (p.group) p.open_group(block / step, &at, &line);
      const Piece<Steps> piece{steps, smaller(step, p.blocks - block), groups, line};
      at = make_steps<Steps, Mask>(at, piece.blocks, steps);
      for (int64_t t = 0; t < x.tokens; t += kTile) {
        const int64_t n = smaller(kTile, x.tokens - t);
        kTiles<Steps>[n - 1](piece, packed + Steps::kTokenBytes * (t * p.blocks + block * n),
                             x.groups + t * groups + block / step, totals + t);
      }
    }
    store_panel(p, panel, x.tokens, totals, y);
  }
  return true;
}

template <class Steps, int Mask>
bool multiply_planes(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                     void* scratch) {
  if (x.tokens == 1) return few_tokens<Steps, Mask, 1>(p, x, first, last, y);
  if (x.tokens == 2) return few_tokens<Steps, Mask, 2>(p, x, first, last, y);
  return many_tokens<Steps, Mask>(p, x, first, last, y, scratch);
}

template <class Steps>
bool multiply_planes(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                     void* scratch) {
  return p.mask == GBLM_4_OF_8
             ? multiply_planes<Steps, GBLM_4_OF_8>(p, x, first, last, y, scratch)
             : multiply_planes<Steps, GBLM_8_OF_16>(p, x, first, last, y, scratch);
}

}  // namespace
