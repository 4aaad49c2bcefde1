// AVX-512: activations become tiles of [words][tokens of the tile].
#pragma once

#include "avx512_round.h"

namespace {

constexpr int kMaxDecode = 16;  // tokens that share one expanded word
constexpr int kMaxTile = 12;    // 2 x 12 sums fill 24 of 32 registers

// Tokens that are multiplied together; up to 16 of them stay with one expanded word.
int64_t tile_width(int64_t tokens) {
  if (tokens <= kMaxDecode) {
    for (const int64_t width : {1, 2, 3, 4, 6, 8, 12, 16})
      if (tokens <= width) return width;
  }
  const int64_t tiles = (tokens + kMaxTile - 1) / kMaxTile;
  return (tokens + tiles - 1) / tiles;
}

// x [tokens][words of 4 bytes] becomes [padded words][width]; what is missing is zero. Four tokens
// and four words at a time change places in registers.
void pack_words(const void* source, int64_t tokens, int64_t words, int64_t width, int64_t padded,
                void* packed) {
  const float* x = static_cast<const float*>(source);
  float* to = static_cast<float*>(packed);
  std::memset(to + words * width, 0, static_cast<size_t>((padded - words) * width) * 4);
  if (width == 1) {
    std::memcpy(to, x, static_cast<size_t>(words) * 4);
    return;
  }
  for (int64_t t = 0; t < width; t += 4) {
    const __mmask8 lanes = static_cast<__mmask8>((1 << smaller<int64_t>(4, width - t)) - 1);
    for (int64_t w = 0; w < words; w += 4) {
      __m128 row[4];
      unroll<4>([&](auto i) LAMBDA {
        row[i] = t + i < tokens ? _mm_loadu_ps(x + (t + i) * words + w) : _mm_setzero_ps();
      });
      _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
      unroll<4>([&](auto i)
                    LAMBDA { _mm_mask_storeu_ps(to + (w + i) * width + t, lanes, row[i]); });
    }
  }
}

void pack_floats(const Panels& p, const uint16_t* x, int64_t tokens, int64_t width, uint32_t* to) {
  pack_words(x, tokens, p.columns / 2, width, p.blocks * kColumns / 2, to);
}

// The same of float32, [columns][width].
void pack_wide_floats(const Panels& p, const float* x, int64_t tokens, int64_t width, float* to) {
  pack_words(x, tokens, p.columns, width, p.blocks * kColumns, to);
}

void pack_integers(const Panels& p, const uint16_t* x, int64_t tokens, int64_t width, uint32_t* to,
                   Rounding* rounding) {
  const int64_t groups = p.columns / p.group;
  for (int64_t t = 0; t < width; t++) {
    for (int64_t g = 0; g < groups; g++) {
      const uint16_t* row = x + smaller(t, tokens - 1) * p.columns + g * p.group;
      const float most = largest(row, p.group);
      const __m512 inverse = inverse_scale(most);
      uint32_t* quad = to + g * p.group / 4 * width + t;
      __m128i sum = _mm_setzero_si128();
      for (int64_t k = 0; k < p.group; k += 16) {
        const __m128i bytes = _mm512_cvtepi32_epi8(round_codes(row + k, inverse));
        sum = _mm_dpbusd_epi32(sum, _mm_set1_epi8(1), bytes);
        if (width == 1) {
          _mm_storeu_si128((__m128i*)(quad + k / 4), bytes);
        } else {
          quad[(k / 4 + 0) * width] = static_cast<uint32_t>(_mm_extract_epi32(bytes, 0));
          quad[(k / 4 + 1) * width] = static_cast<uint32_t>(_mm_extract_epi32(bytes, 1));
          quad[(k / 4 + 2) * width] = static_cast<uint32_t>(_mm_extract_epi32(bytes, 2));
          quad[(k / 4 + 3) * width] = static_cast<uint32_t>(_mm_extract_epi32(bytes, 3));
        }
      }
      rounding[g * width + t] = {most / 127, 128 * add_lanes(sum)};
    }
  }
}

}  // namespace
