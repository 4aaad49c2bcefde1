// ARM64: what an instruction set offers. Weights without planes go to the portable kernels.
#pragma once

#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "neon_pack.h"

namespace {

// Known of Linux only; elsewhere the portable kernels serve.
inline bool has_dot_product() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}
inline bool has_bf16() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
#else
  return false;
#endif
}

// Activations of type X; bf16 meet bf16 weights in Halves.
template <class X, class Halves>
struct Neon {
  static constexpr bool kWide = sizeof(X) == 4;
  static const Isa& portable() { return kWide ? *kPortable.wide : kPortable; }

  static int64_t panels_per_task(const Panels& p, int64_t tokens, int64_t threads) {
    return portable().panels_per_task(p, tokens, threads);
  }
  static int64_t token_bytes(const Panels& p) {
    return p.blocks * kColumns * (p.group ? 1 : static_cast<int64_t>(sizeof(X)));
  }
  static int64_t packed_bytes(const Panels& p, int64_t tokens) {
    return has_planes(p.mask) ? tokens * token_bytes(p) : portable().packed_bytes(p, tokens);
  }
  static int64_t scratch_bytes(const Panels& p, int64_t tokens) {
    return has_planes(p.mask) ? planes_scratch_bytes(tokens) : portable().scratch_bytes(p, tokens);
  }
  static int64_t width(const Panels& p, int64_t tokens) {
    return has_planes(p.mask) ? kTile : portable().width(p, tokens);
  }

  static void pack(const Panels& p, const void* rows, int64_t tokens, int64_t tile, void* packed,
                   Rounding* groups) {
    if (!has_planes(p.mask)) return portable().pack(p, rows, tokens, tile, packed, groups);
    const int64_t first = tile * kTile, here = smaller(kTile, tokens - first);
    const X* x = static_cast<const X*>(rows);
    uint8_t* to = static_cast<uint8_t*>(packed) + first * token_bytes(p);
    if constexpr (!kWide)
      if (p.group)
        return pack_integers(p, x, here, reinterpret_cast<int8_t*>(to),
                             groups + first * count_groups(p));
    pack_floats(p, x, here, to);
  }

  static bool multiply(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                       void* scratch) {
    if (!has_planes(p.mask)) return portable().multiply(p, x, first, last, y, scratch);
    if constexpr (kWide) return multiply_planes<Floats>(p, x, first, last, y, scratch);
    switch (p.values) {
      case GBLM_INT8:
        return multiply_planes<Codes<GBLM_INT8>>(p, x, first, last, y, scratch);
      case GBLM_INT4:
        return multiply_planes<Codes<GBLM_INT4>>(p, x, first, last, y, scratch);
      default:
        return multiply_planes<Halves>(p, x, first, last, y, scratch);
    }
  }

  static constexpr Isa isa(const char* name, bool (*supported)(), const Isa* wide) {
    return {name,  supported, panels_per_task, packed_bytes, scratch_bytes,
            width, pack,      multiply,        gate_token,   wide};
  }
};

}  // namespace
