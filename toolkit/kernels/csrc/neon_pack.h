// ARM64: activations become tiles of [blocks][tokens of the tile][32 columns].
#pragma once

#include "neon_planes.h"

namespace {

// A tile of bf16 or float32; columns that are missing are zero.
template <class X>
void pack_floats(const Panels& p, const X* x, int64_t tokens, uint8_t* to) {
  constexpr int64_t bytes = sizeof(X);
  for (int64_t column = 0; column < p.blocks * kColumns; column += kColumns)
    for (int64_t t = 0; t < tokens; t++, to += kColumns * bytes) {
      uint8_t block[kColumns * bytes] = {};
      std::memcpy(block, x + t * p.columns + column,
                  static_cast<size_t>(smaller(kColumns, p.columns - column) * bytes));
      for (int64_t byte = 0; byte < bytes; byte++)
        for (int64_t k = 0; k < kColumns; k++) to[byte * kColumns + k] = block[k * bytes + byte];
    }
}

INLINE float largest(const uint16_t* x, int64_t count) {
  // As integers, magnitudes of bf16 are in order, and NaN is above all.
  uint16x8_t most = vdupq_n_u16(0);
  for (int64_t k = 0; k < count; k += 8)
    most = vmaxq_u16(most, vbicq_u16(vld1q_u16(x + k), vdupq_n_u16(0x8000)));
  return from_bf16(vmaxvq_u16(most));
}

// Halves go to even; NaN becomes 0, its group's scale keeps it.
INLINE int16x4_t round_codes(uint16x4_t x, float inverse) {
  const float32x4_t wide = vreinterpretq_f32_u32(vshll_n_u16(x, 16));
  return vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(wide, inverse)));
}

// A tile of codes.
inline void pack_integers(const Panels& p, const uint16_t* x, int64_t tokens, int8_t* to,
                          Rounding* rounding) {
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t first = 0; first < p.columns; first += p.group, rounding++) {
      const uint16_t* row = x + t * p.columns;
      const float most = largest(row + first, p.group), inverse = most > kLeast ? 127 / most : 0;
      *rounding = {most / 127, 0};
      for (int64_t k = first; k < first + p.group; k += 8) {
        const uint16x8_t halves = vld1q_u16(row + k);
        const int16x8_t codes = vcombine_s16(round_codes(vget_low_u16(halves), inverse),
                                             round_codes(vget_high_u16(halves), inverse));
        vst1_s8(to + (k / kColumns * tokens + t) * kColumns + k % kColumns, vmovn_s16(codes));
      }
    }
}

}  // namespace
