// The activation of gated linears; every instruction set compiles its own.
#pragma once

#include "panels.h"

namespace {

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

// y [features] = silu(gate) * up of one token, whose sums are gate [features], then up [features].
inline void gate_token(const float* sums, int64_t features, float* y) {
  const float* up = sums + features;
  for (int64_t i = 0; i < features; i++) y[i] = sums[i] / (1 + exponential(-sums[i])) * up[i];
}

}  // namespace
