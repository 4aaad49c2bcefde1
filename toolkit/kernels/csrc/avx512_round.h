// AVX-512: activations on their way to int8.
#pragma once

#include "avx512_words.h"

namespace {

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

// What the activations of a group are multiplied by.
INLINE __m512 inverse_scale(float most) { return _mm512_set1_ps(most > kLeast ? 127 / most : 0); }

INLINE __m512i round_codes(const uint16_t* x, __m512 inverse) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(widen(x), inverse));
}

INLINE int add_lanes(__m128i sum) {
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

}  // namespace
