// AMX: up to 32 tokens. While one step of two panels is multiplied, later ones are expanded.
#pragma once

#include "amx_tiles.h"

namespace {

constexpr int64_t kDecodeTiles = 2;  // of tokens: their sums stay in registers
constexpr int64_t kRing = 4, kStepsAhead = 2;

// A panel on its way through the ring, one step after the other.
template <class Reader>
class Stream {
 public:
  Stream(const Panels& panels, int64_t panel, uint8_t* ring)
      : p_(panels), panel_(panel), at_(panels.begin(panel)), ring_(ring) {}

  // Expand the next step, the first of a group or not; false when the panel is damaged.
  INLINE bool expand_step(int64_t step, int64_t group, bool starts, int64_t blocks) {
    if (Reader::kWords == 8 && starts) {
      if (__builtin_expect(at_ > p_.limit, 0)) return false;
      lines[group % kRing] = at_;
      at_ += kLine;
    }
    const Words w = expand<Reader>(p_, at_, blocks, ring_ + step % kRing * kTile);
    words[step % kRing] = w.first;
    at_ = w.next;
    return at_ != nullptr;
  }
  bool ends() const { return p_.ends(panel_, at_); }

  const uint8_t *words[kRing], *lines[kRing];

 private:
  const Panels& p_;
  const int64_t panel_;
  const uint8_t* at_;
  uint8_t* const ring_;
};

// Sums [tokens][2 * 16 rows] of two panels; false when they are damaged.
template <class Reader, int T>
bool decode_pair(const Panels& p, const Activations& x, const TokenTiles& tokens,
                 const int64_t (&panels)[2], uint8_t* ring, float* sums) {
  constexpr bool kFloat = Reader::kWords == 16;
  using Float = std::bool_constant<kFloat>;
  Stream<Reader> a(p, panels[0], ring), b(p, panels[1], ring + kRing * kTile);
  const int64_t per_group = kFloat ? tokens.steps : TokenTiles::group_steps(p);
  const int64_t blocks = p.group / kColumns;
  int64_t next = 0, next_group = 0, next_in_group = 0;
  const auto produce = [&]() LAMBDA {
    if (next == tokens.steps) return true;
    const int64_t n = kFloat ? 1 : smaller<int64_t>(2, blocks - 2 * next_in_group);
    const bool good = a.expand_step(next, next_group, next_in_group == 0, n) &&
                      b.expand_step(next, next_group, next_in_group == 0, n);
    next++;
    if (++next_in_group == per_group) {
      next_in_group = 0;
      next_group++;
    }
    return good;
  };
  const uint8_t* from = static_cast<const uint8_t*>(x.packed);
  const float* scales = x.scales;
  const int64_t scale_stride = tokens.steps / per_group * tokens.width;
  Exact exact[2];
  const auto scale_group = [&](int64_t group) LAMBDA {
    if constexpr (!kFloat) {
      const uint8_t* const lines[2] = {a.lines[group % kRing], b.lines[group % kRing]};
      add_scaled<Reader::kShift, T>(exact[group % 2], lines, scales, scale_stride, tokens.width,
                                    sums);
      scales += tokens.width;
    }
  };
  for (int64_t i = 0; i < kStepsAhead; i++)
    if (!produce()) return false;
  int64_t group = 0, in_group = 0;
  unroll<2 * T>([&](auto i) LAMBDA { zero_tile<i>(); });
  for (int64_t s = 0; s < tokens.steps; s++, from += tokens.step_bytes()) {
    if (!produce()) return false;
    const uint8_t* const words[2] = {a.words[s % kRing], b.words[s % kRing]};
    multiply_steps<Float, T>(words, 1, from, tokens);
    if (!kFloat && ++in_group == per_group) {
      if (group > 0) scale_group(group - 1);
      unroll<2 * T>([&](auto i) LAMBDA {
        store_tile<i>(exact[group % 2].sums[i], kLine);
        zero_tile<i>();
      });
      in_group = 0;
      group++;
    }
  }
  if constexpr (kFloat)
    unroll<2 * T>([&](auto i) LAMBDA {
      store_tile<i>(sums + i / 2 * tokens.width * 2 * kRows + i % 2 * kRows, kSumStride);
    });
  else
    scale_group(group - 1);
  return a.ends() && b.ends();
}

}  // namespace
