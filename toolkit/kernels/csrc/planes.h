// What the kernels of several instruction sets share: loops with constant indices, asking for
// memory ahead, and how panels are cut into pieces whose steps fit into cache.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <utility>

#include "isa.h"

#define INLINE inline __attribute__((always_inline))
#define LAMBDA __attribute__((always_inline))

namespace {

// f(0) … f(N - 1) with constants: g++ keeps arrays in registers only if every index is one.
template <class F, int... I>
INLINE void each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
INLINE void unroll(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}

// Tables and activations are loaded anew: g++ keeps too many in registers, and spills sums.
INLINE void forget() { asm volatile("" ::: "memory"); }

#if defined(__x86_64__)
constexpr int64_t kAhead = 2048;  // bytes

template <bool Ask>
INLINE void ask_ahead(const uint8_t* at, int64_t bytes) {
  if constexpr (!Ask) return;
  const char* from = reinterpret_cast<const char*>(at);
  for (int64_t i = 0; i < bytes; i += kLine) {
    if (kOnZen)
      _mm_prefetch(from + 8192 + i, _MM_HINT_NTA);
    else
      _mm_prefetch(from + kAhead + i, _MM_HINT_T0);
  }
}
#endif

constexpr int64_t kStepCache = int64_t{1} << 14;  // of the steps of a panel
constexpr int64_t kMaxPieces = 32;

// How a panel is cut into pieces, groups of integers: blocks of one, and pieces of the panel and of
// the cache.
struct Cut {
  int64_t blocks, pieces, together;

  INLINE Cut(const Panels& p, int64_t block_bytes) {
    blocks = p.group ? p.group / kColumns : kStepCache / block_bytes;
    pieces = (p.blocks + blocks - 1) / blocks;
    together = larger<int64_t>(1, kStepCache / (blocks * block_bytes));
  }
};

}  // namespace
