// AMX: blocks of planes as the words that tiles want. Every column finds its weight by its rank,
// the number of kept columns before it in its byte of mask: a gather the other way round.
#pragma once

#include "avx512_expand.h"

namespace {

// Of each row the same byte of its mask, in every byte; in every half with `Wide`.
template <int Byte, bool Wide>
INLINE __m512i repeat_byte(__m512i masks) {
  constexpr int ones = Wide ? 0x00010001 : 0x01010101;
  constexpr int first = Wide ? static_cast<int>(0x80008000u) + Byte * ones : Byte * ones;
  const __m128i order =
      _mm_setr_epi32(first, first + 4 * ones, first + 8 * ones, first + 12 * ones);
  return _mm512_shuffle_epi8(masks, _mm512_broadcast_i32x4(order));
}

struct Rows {
  alignas(64) uint8_t quads[64] = {};
  alignas(64) uint16_t halves[32] = {};

  constexpr Rows() {
    for (int i = 0; i < 64; i++) quads[i] = static_cast<uint8_t>(i / 4 * 4);
    for (int i = 0; i < 32; i++) halves[i] = static_cast<uint16_t>(i / 2 * 2);
  }
};
constexpr Rows kRowStarts;

template <int Values, int Mask>
struct PlaneCodes {
  static constexpr int kWords = 8, kShift = Values == GBLM_INT4 ? 4 : 0;
  static constexpr bool kInPlace = false;

  // Codes + 128; of int4 16 times.
  template <int K>
  static INLINE __m512i plane(const uint8_t* planes) {
    if constexpr (Values == GBLM_INT8) return load512(planes + kLine * K);
    __m512i codes = load512(planes + kLine * (K / 2));
    if constexpr (K % 2 == 0) codes = _mm512_slli_epi16(codes, 4);
    return _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<char>(0xF0)));
  }

  template <class Visit>
  static INLINE const uint8_t* block(const uint8_t* at, Visit&& visit) {
    const __m512i masks = load512(at);
    const uint8_t* planes = at + kMaskBytes;
    const __m512i p[4] = {plane<0>(planes), plane<1>(planes), plane<2>(planes), plane<3>(planes)};
    unroll<kWords>([&](auto w) LAMBDA {
      constexpr int byte = w / 2;
      constexpr int below = w % 2 ? 0x7F3F1F0F : 0x07030100;
      constexpr int own = static_cast<int>(w % 2 ? 0x80402010u : 0x08040201u);
      const __m512i bits = repeat_byte<byte, false>(masks);
      const __m512i rank = _mm512_popcnt_epi8(_mm512_and_si512(bits, _mm512_set1_epi32(below)));
      const __m512i place = _mm512_or_si512(load512(kRowStarts.quads), _mm512_set1_epi8(byte));
      const __m512i odd = _mm512_and_si512(_mm512_slli_epi16(rank, 6), _mm512_set1_epi8(0x40));
      const __m512i index = _mm512_or_si512(place, odd);
      __m512i upper = index;
      __mmask64 is_upper = _mm512_test_epi8_mask(rank, _mm512_set1_epi8(2));
      if constexpr (Mask == GBLM_8_OF_16) {  // the fifth is in plane 3 of the neighbour
        const __mmask64 fifth = _mm512_test_epi8_mask(rank, _mm512_set1_epi8(4));
        const __m512i other = _mm512_xor_si512(place, _mm512_set1_epi8(0x41));
        upper = _mm512_mask_mov_epi8(upper, fifth, other);
        is_upper |= fifth;
      }
      const __m512i value =
          _mm512_mask_blend_epi8(is_upper, _mm512_permutex2var_epi8(p[0], index, p[1]),
                                 _mm512_permutex2var_epi8(p[2], upper, p[3]));
      const __mmask64 kept = _mm512_test_epi8_mask(bits, _mm512_set1_epi32(own));
      visit(w, _mm512_mask_mov_epi8(_mm512_set1_epi8(static_cast<char>(0x80)), kept, value));
    });
    return at + block_size(Values, Mask);
  }
};

template <int Mask>
struct PlaneHalves {
  static constexpr int kWords = 16;
  static constexpr bool kInPlace = false;

  template <class Visit>
  static INLINE const uint8_t* block(const uint8_t* at, Visit&& visit) {
    const __m512i masks = load512(at);
    const uint8_t* planes = at + kMaskBytes;
    unroll<kWords>([&](auto w) LAMBDA {
      constexpr int byte = w / 4, bit = w % 4 * 2, line = byte % 2;
      constexpr int own = 1 << bit | 2 << bit << 16;
      const __m512i bits = repeat_byte<byte, true>(masks);
      const __m512i below = _mm512_set1_epi32(own - 0x00010001);
      const __m512i rank = _mm512_popcnt_epi8(_mm512_and_si512(bits, below));
      const __m512i place =
          _mm512_or_si512(load512(kRowStarts.halves), _mm512_set1_epi16(byte / 2));
      const __m512i odd = _mm512_and_si512(_mm512_slli_epi16(rank, 5), _mm512_set1_epi16(0x20));
      const __m512i index = _mm512_or_si512(place, odd);
      const auto of = [&](int plane, int from)
                          LAMBDA { return load512(planes + kLine * (2 * plane + from)); };
      __m512i value =
          _mm512_mask_blend_epi16(_mm512_test_epi16_mask(rank, _mm512_set1_epi16(2)),
                                  _mm512_permutex2var_epi16(of(0, line), index, of(1, line)),
                                  _mm512_permutex2var_epi16(of(2, line), index, of(3, line)));
      if constexpr (Mask == GBLM_8_OF_16)  // the fifth is in plane 3 of the neighbour
        value = _mm512_mask_permutexvar_epi16(
            value, _mm512_test_epi16_mask(rank, _mm512_set1_epi16(4)), place, of(3, 1 - line));
      visit(w, _mm512_maskz_mov_epi16(_mm512_test_epi16_mask(bits, _mm512_set1_epi32(own)), value));
    });
    return at + block_size(GBLM_BF16, Mask);
  }
};

}  // namespace
