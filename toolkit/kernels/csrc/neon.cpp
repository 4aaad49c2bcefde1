// ARM64 with dot products of bytes (Cortex-A76, Neoverse N1 and later): bf16 becomes float32.
#include "neon_isa.h"

namespace {

using Widening = Halves<Widened>;
constexpr Isa kNeonWide = Neon<float, Widening>::isa("neon", has_dot_product, nullptr);

}  // namespace

const Isa kNeon = Neon<uint16_t, Widening>::isa("neon", has_dot_product, &kNeonWide);
