// ARM64 with dot products of bytes and of bf16 (Neoverse V1, N2 and later).
#include "neon_isa.h"

namespace {

struct Bf16Dot {
  static INLINE float32x4_t add(float32x4_t sum, uint8x16_t weights, uint8x16_t picked) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u8(weights), vreinterpretq_bf16_u8(picked));
  }
};

bool supported() { return has_dot_product() && has_bf16(); }

using Dots = Halves<Bf16Dot>;
constexpr Isa kNeonBf16Wide = Neon<float, Dots>::isa("neon_bf16", supported, nullptr);

}  // namespace

const Isa kNeonBf16 = Neon<uint16_t, Dots>::isa("neon_bf16", supported, &kNeonBf16Wide);
