// float16, for the ONNX Runtime adapter.
#pragma once

#include "panels.h"

namespace {

inline float from_f16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, magnitude = half & 0x7FFFu;
  const uint32_t bits = magnitude >= 0x7C00 ? 0x7F800000 | magnitude << 13 : magnitude << 13;
  // float32's exponents are 112 more; multiplying makes subnormal numbers normal.
  const float scaled = magnitude >= 0x7C00 ? load<float>(&bits) : load<float>(&bits) * 0x1p112f;
  const uint32_t joined = sign | load<uint32_t>(&scaled);
  return load<float>(&joined);
}

inline uint16_t to_f16(float value) {
  const uint32_t bits = load<uint32_t>(&value), sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude < 0x38800000) {  // subnormal: the sum's last bit is worth 2^-24
    const float sum = load<float>(&magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (load<uint32_t>(&sum) - 0x3F000000));
  }
  magnitude += 0xC8000FFF + (magnitude >> 13 & 1);  // exponent - 112, round to even
  return static_cast<uint16_t>(sign | magnitude >> 13);
}

}  // namespace
