// float16, and the activation of gated linears, for the ONNX Runtime adapter.
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

// e^x to 2 units in the last place, without a branch, so that loops over it become vectors.
inline float exponential(float x) {
  constexpr float most = 88, log2_e = 1.44269504f, log_2_high = 0.693359375f;
  constexpr float log_2_low = -2.12194440e-4f, round = 0x1.8p23f;
  x = x > most ? most : x < -most ? -most : x;
  const float shifted = x * log2_e + round, power = shifted - round;
  const float r = x - power * log_2_high - power * log_2_low;
  // The series of e^r, |r| < 0.35.
  const float series =
      1 + r * (1 + r * (1.f / 2 + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r / 720)))));
  const uint32_t scale = (load<uint32_t>(&shifted) << 23) + 0x3F800000;
  return series * load<float>(&scale);
}

// y = silu(gate) * up, of one token.
inline void gate_token(const float* gate, const float* up, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i++) y[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

}  // namespace
