// What one instruction set offers to the driver.
#pragma once

#include "panels.h"

// How a group of a token's activations became codes: their scale, and what their products with
// codes + 128 have too much.
struct Rounding {
  float scale;
  int32_t excess;
};

// Activations of a call, packed by the instruction set that uses them.
struct Activations {
  const void* packed;
  const Rounding* groups;  // integers only
  int64_t tokens;
};

// Where sums go, [tokens, rows]: as they are, or rounded to bf16. One of the two is null.
struct Output {
  uint16_t* rounded;
  float* wide;

  GBLM_INLINE Output from(int64_t token, const Panels& p) const {
    return wide != nullptr ? Output{nullptr, wide + token * p.rows}
                           : Output{rounded + token * p.rows, nullptr};
  }
};

struct Isa {
  const char* name;
  bool (*supported)();
  // Panels that one task takes together.
  int64_t (*panels_per_task)(const Panels&, int64_t tokens, int64_t threads);
  // Bytes of packed activations for so many tokens, and of scratch for each thread.
  int64_t (*packed_bytes)(const Panels&, int64_t tokens);
  int64_t (*scratch_bytes)(const Panels&, int64_t tokens);
  // Packing is cut into tiles of so many tokens, which may be packed in parallel; `rows` are the
  // activations of the tile's own tokens.
  int64_t (*width)(const Panels&, int64_t tokens);
  void (*pack)(const Panels&, const void* rows, int64_t tokens, int64_t tile, void* packed,
               Rounding* groups);
  // y [tokens, rows] of some panels; false when the panels are damaged.
  bool (*multiply)(const Panels&, const Activations&, int64_t first, int64_t last, Output y,
                   void* scratch);
  // y [features] = silu(gate) * up, of the sums gate [features], up [features] of one token.
  void (*gate)(const float* sums, int64_t features, float* y);
  // For bf16 weights and float32 activations; null: those come as two bf16 terms.
  const Isa* wide;
};

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512, kAmx;
#elif defined(__aarch64__)
extern const Isa kNeon, kNeonBf16;
#endif
