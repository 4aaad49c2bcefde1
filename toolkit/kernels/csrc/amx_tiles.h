// AMX: tile registers, and products of two panels and up to two tiles of tokens.
//
// An expanded block of bf16, and two of integers, are a tile as the product wants its second
// factor: 16 lines of 64 bytes, a line of 16 rows x 4 bytes of columns. The first factor is a line
// of 64 bytes for each token. Four sums (registers 0 to 3), two tiles of activations (4 and 5) and
// two of weights (6 and 7) fill all registers.
#pragma once

#include "amx_registers.h"

namespace {

// Packed activations: tiles of as many tokens each, of [steps][tokens][64 bytes].
struct TokenTiles {
  int64_t count, width, steps;  // a step is 32 columns, or 64 of integers
  TokenTiles(const Panels& p, int64_t tokens) {
    count = (tokens + kTileRows - 1) / kTileRows;
    width = (tokens + count - 1) / count;
    steps = p.group == 0 ? p.blocks : p.columns / p.group * group_steps(p);
  }
  // What a group lacks to whole steps is zeros of the activations.
  static int64_t group_steps(const Panels& p) { return (p.group + 63) / 64; }
  int64_t step_bytes() const { return width * kLine; }
  // An odd number of 16 KB: the same columns of all tiles find room in the cache.
  int64_t tile_bytes() const { return round_up(steps * step_bytes(), 32768) + 16384; }
  int64_t padded() const { return count * width; }
};

// Sums of two panels and T tiles of tokens: register 2 t + i. each() goes with every step.
template <class Float, int T, class Each>
INLINE void multiply_steps(const uint8_t* const (&w)[2], int64_t steps, const uint8_t* x,
                           const TokenTiles& tokens, Each&& each) {
  const int64_t step_bytes = tokens.step_bytes(), tile_bytes = tokens.tile_bytes();
  for (int64_t s = 0; s < steps; s++) {
    const uint8_t* at = x + s * step_bytes;
    each();
    load_passing_tile<4>(at, kLine);
    load_tile<6>(w[0] + s * kTile, kLine);
    multiply_tiles<0, 4, 6>(Float());
    load_tile<7>(w[1] + s * kTile, kLine);
    multiply_tiles<1, 4, 7>(Float());
    if constexpr (T == 2) {
      load_passing_tile<5>(at + tile_bytes, kLine);
      multiply_tiles<2, 5, 6>(Float());
      multiply_tiles<3, 5, 7>(Float());
    }
  }
}

// The next two panels' weights, asked into the second-level cache while others are multiplied.
struct Ahead {
  const uint8_t* at[2];
  int64_t lines;  // of each panel, with every step

  INLINE void step() {
    for (int64_t i = 0; i < lines; i++)
      unroll<2>([&](auto j) LAMBDA {
        _mm_prefetch(reinterpret_cast<const char*>(at[j]), _MM_HINT_T1);
        at[j] += kLine;
      });
  }
};

// Sums of a pair of panels are [tokens][2 * 16 rows].
constexpr int64_t kSumStride = 2 * kRows * static_cast<int64_t>(sizeof(float));

// One token's sums of a panel and the next one, if it is not the last.
INLINE void store_pair(const Panels& p, int64_t panel, int64_t last, const float* sums, Output y) {
  store_rows(p, panel, _mm512_loadu_ps(sums), y);
  if (panel + 1 < last) store_rows(p, panel + 1, _mm512_loadu_ps(sums + kRows), y);
}

template <int T>
void float_tile(const uint8_t* const (&w)[2], int64_t steps, const uint8_t* x,
                const TokenTiles& tokens, float* sums, Ahead& ahead) {
  float* more = sums + tokens.width * 2 * kRows;
  load_tile<0>(sums, kSumStride);
  load_tile<1>(sums + kRows, kSumStride);
  if constexpr (T == 2) {
    load_tile<2>(more, kSumStride);
    load_tile<3>(more + kRows, kSumStride);
  }
  multiply_steps<std::true_type, T>(w, steps, x, tokens, [&]() LAMBDA { ahead.step(); });
  store_tile<0>(sums, kSumStride);
  store_tile<1>(sums + kRows, kSumStride);
  if constexpr (T == 2) {
    store_tile<2>(more, kSumStride);
    store_tile<3>(more + kRows, kSumStride);
  }
}

// Exact sums of a group, of tokens x rows of each of the four registers.
struct Exact {
  alignas(64) int32_t sums[4][kTileRows][kRows];
};

template <int T>
INLINE void add_scaled(const Exact& exact, const __m512 (&s)[2], const Rounding* groups,
                       int64_t stride, int64_t width, float* sums) {
  unroll<T>([&](auto t) LAMBDA {
    for (int64_t r = 0; r < width; r++, sums += 2 * kRows) {
      const Rounding& group = groups[t * stride + r];
      const __m512 token = _mm512_set1_ps(group.scale);
      const __m512i excess = _mm512_set1_epi32(group.excess);
      unroll<2>([&](auto i) LAMBDA {
        const __m512i codes = load512(exact.sums[2 * t + i][r]);
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, excess));
        const __m512 scale = _mm512_mul_ps(s[i], token);
        float* to = sums + i * kRows;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(to)));
      });
    }
  });
}

constexpr int64_t kMaxTogether = 32;  // groups that are in cache at once

// Groups of two panels: their scales and words.
struct Groups {
  int64_t count, steps;
  const uint8_t *lines[kMaxTogether][2], *words[kMaxTogether][2];
};

// Sums of one group are scaled while the next one is multiplied.
template <int Shift, int T>
void integer_tile(const Groups& groups, const uint8_t* x, const TokenTiles& tokens,
                  const Rounding* rounding, int64_t stride, float* sums, Ahead& ahead) {
  Exact exact[2];
  for (int64_t g = 0; g <= groups.count; g++) {
    if (g < groups.count) {
      unroll<2 * T>([&](auto i) LAMBDA { zero_tile<i>(); });
      multiply_steps<std::false_type, T>(groups.words[g], groups.steps, x, tokens,
                                         [&]() LAMBDA { ahead.step(); });
      x += groups.steps * tokens.step_bytes();
    }
    if (g > 0) {
      const __m512 s[2] = {group_scales<Shift>(groups.lines[g - 1][0]),
                           group_scales<Shift>(groups.lines[g - 1][1])};
      add_scaled<T>(exact[(g - 1) % 2], s, rounding, stride, tokens.width, sums);
      rounding += tokens.width;
    }
    if (g < groups.count)
      unroll<2 * T>([&](auto i) LAMBDA { store_tile<i>(exact[g % 2].sums[i], kLine); });
  }
}

}  // namespace
