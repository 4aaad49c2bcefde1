// AVX-512: activations become tiles of [words][tokens of the tile].
#pragma once

#include "avx512_words.h"

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
  const __m256i half =
      _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  const __m128i quarter =
      _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
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

}  // namespace
