// AMX: up to 32 tokens. While one step of two panels is multiplied, later ones are expanded.
#pragma once

#include "amx_tiles.h"

namespace {

constexpr int64_t kDecodeTiles = 2;  // of tokens: their sums stay in registers
constexpr int64_t kRing = 2, kStepsAhead = 1;
constexpr int64_t kOpenGroups = 4;  // expanded, not yet scaled

constexpr int64_t kRingBytes = 2 * kRing * kTile;
constexpr int64_t kDecodeBytes = kRingBytes + kDecodeTiles * kTileRows * kSumStride;

// The look-ahead of a panel ends in the one behind it, and of a pair in the first of the next pair.
INLINE void ask_for_start(const uint8_t* panel) {
  for (int64_t i = 0; i < kAhead; i += kLine)
    _mm_prefetch(reinterpret_cast<const char*>(panel + i), _MM_HINT_T0);
}

// A panel on its way through a ring of steps.
template <class Reader>
struct Stream {
  const uint8_t *at, *line;
  uint8_t* ring;
  const uint8_t *words[kRing], *lines[kOpenGroups];

  void start(const uint8_t* panel, uint8_t* memory) {
    at = panel;
    line = nullptr;
    ring = memory;
  }
  // Expand the next step; false when the panel is damaged.
  INLINE bool expand_step(const Panels& p, int64_t step, int64_t blocks) {
    const Words w = expand<Reader>(p, at, blocks, ring + step % kRing * kTile);
    words[step % kRing] = w.first;
    at = w.next;
    return at != nullptr;
  }
  INLINE bool open_group(const Panels& p, int64_t group) {
    if (!p.open_group(group, &at, &line)) return false;
    lines[group % kOpenGroups] = line;
    return true;
  }
  INLINE __m512 scales(int64_t group) const {
    return group_scales<Reader::kShift>(lines[group % kOpenGroups]);
  }
};

// Two panels and T tiles of tokens.
template <class Reader, int T>
class Decoder {
 public:
  static constexpr bool kFloat = Reader::kWords == 16;
  using Float = std::bool_constant<kFloat>;

  Decoder(const Panels& panels, const Activations& activations, const TokenTiles& tiles,
          void* memory)
      : p_(panels), x_(activations), tokens_(tiles), ring_(static_cast<uint8_t*>(memory)) {
    sums_ = reinterpret_cast<float*>(ring_ + kRingBytes);
  }

  // False when the panels are damaged.
  bool run(int64_t first, int64_t last, Output y) {
    for (int64_t panel = first; panel < last; panel += 2) {
      const int64_t second = smaller(panel + 1, last - 1);  // the same again if there is none
      ask_for_start(p_.begin(smaller(panel + 3, last - 1)));
      if (!multiply(panel, second)) return false;
      for (int64_t t = 0; t < x_.tokens; t++)
        store_pair(p_, panel, last, sums_ + t * 2 * kRows, y.from(t, p_));
    }
    return true;
  }

 private:
  bool multiply(int64_t first, int64_t second) {
    streams_[0].start(p_.begin(first), ring_);
    streams_[1].start(p_.begin(second), ring_ + kRing * kTile);
    bool good;
    if constexpr (kFloat)
      good = floats();
    else
      good = integers();
    return good && p_.ends(first, streams_[0].at) && p_.ends(second, streams_[1].at);
  }

  INLINE bool expand_steps(int64_t step, int64_t blocks) {
    bool good = true;
    unroll<2>([&](auto i) LAMBDA { good = good && streams_[i].expand_step(p_, step, blocks); });
    return good;
  }
  INLINE void multiply_step(int64_t step) {
    const uint8_t* words[2];
    unroll<2>([&](auto i) LAMBDA { words[i] = streams_[i].words[step % kRing]; });
    multiply_steps<Float, T>(words, 1, packed() + step * tokens_.step_bytes(), tokens_,
                             []() LAMBDA {});
  }
  const uint8_t* packed() const { return static_cast<const uint8_t*>(x_.packed); }

  bool floats() {
    unroll<2 * T>([&](auto i) LAMBDA { zero_tile<i>(); });
    for (int64_t s = -kStepsAhead; s < tokens_.steps; s++) {
      if (s + kStepsAhead < tokens_.steps && !expand_steps(s + kStepsAhead, 1)) return false;
      if (s >= 0) multiply_step(s);
    }
    unroll<2 * T>([&](auto i) LAMBDA {
      store_tile<i>(sums_ + (i / 2 * tokens_.width * 2 + i % 2) * kRows, kSumStride);
    });
    return true;
  }

  // Expand the next step, if there is one.
  INLINE bool advance() {
    if (next_ == tokens_.steps) return true;
    bool good = true;
    if (in_group_ == 0) {
      unroll<2>([&](auto i) LAMBDA { good = good && streams_[i].open_group(p_, group_); });
      if (!good) return false;
    }
    good = expand_steps(next_++, smaller<int64_t>(2, p_.group / kColumns - 2 * in_group_));
    if (++in_group_ == TokenTiles::group_steps(p_)) {
      in_group_ = 0;
      group_++;
    }
    return good;
  }

  INLINE void scale_group(int64_t group) {
    const int64_t groups = p_.columns / p_.group;
    const __m512 scales[2] = {streams_[0].scales(group), streams_[1].scales(group)};
    add_scaled<T>(exact_[group % 2], scales, x_.groups + group * tokens_.width,
                  groups * tokens_.width, tokens_.width, sums_);
  }

  // Sums of one group are scaled while the next one is multiplied.
  bool integers() {
    const int64_t groups = p_.columns / p_.group, steps = TokenTiles::group_steps(p_);
    next_ = group_ = in_group_ = 0;
    std::memset(sums_, 0, static_cast<size_t>(tokens_.padded() * kSumStride));
    for (int64_t i = 0; i < kStepsAhead; i++)
      if (!advance()) return false;
    for (int64_t g = 0; g < groups; g++) {
      unroll<2 * T>([&](auto i) LAMBDA { zero_tile<i>(); });
      for (int64_t s = g * steps; s < (g + 1) * steps; s++) {
        if (!advance()) return false;
        multiply_step(s);
      }
      if (g > 0) scale_group(g - 1);
      unroll<2 * T>([&](auto i) LAMBDA { store_tile<i>(exact_[g % 2].sums[i], kLine); });
    }
    scale_group(groups - 1);
    return true;
  }

  const Panels& p_;
  const Activations& x_;
  const TokenTiles& tokens_;
  uint8_t* ring_;
  float* sums_;  // [tokens][2 * 16 rows]
  Stream<Reader> streams_[2];
  int64_t next_, group_, in_group_;  // what is expanded next
  Exact exact_[2];
};

}  // namespace
