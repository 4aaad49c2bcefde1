// AMX: the tile registers, and whether this process may use them.
#pragma once

#include <cpuid.h>

#include <type_traits>

#include "avx512_expand.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kTile = 1024;    // bytes
constexpr int64_t kTileRows = 16;  // tokens

// In assembly, as the intrinsics of g++ 12 do not say that loading reads memory.
template <int T>
INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
// Into the second-level cache only: activations pass by, weights and sums stay in the first.
template <int T>
INLINE void load_passing_tile(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Sum += tokens x weights: of bf16, or of signed and unsigned bytes.
template <int Sum, int Tokens, int Weights>
INLINE void multiply_tiles(std::true_type) {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Tokens), "i"(Weights));
}
template <int Sum, int Tokens, int Weights>
INLINE void multiply_tiles(std::false_type) {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Tokens), "i"(Weights));
}

// The registers are set up while it lives: other code in the process has its own set-ups.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t tokens) {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } set_up;
    for (int i = 0; i < 8; i++) set_up.rows[i] = static_cast<uint8_t>(i < 6 ? tokens : kTileRows);
    asm volatile("ldtilecfg %0" ::"m"(set_up));
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { asm volatile("tilerelease"); }
};

inline bool has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, osxsave = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & bf16) && (d & tile) && (d & int8);
}

// The system keeps tiles across threads, and lets this process have them.
inline bool may_use_tiles() {
#if defined(__linux__)
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tiles = 3u << 17;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (low & tiles) == tiles && syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace
