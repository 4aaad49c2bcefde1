// The C ABI of a linear: checks, turns of many tokens, float32 activations.
#include "driver.h"

namespace {

// More tokens are taken in turns: bounds the scratch memory, and costs 1 % of expanding again.
constexpr int64_t kMaxTokens = 512;

thread_local Buffer t_terms;

// Rows that lie one after another.
struct Rows {
  const uint8_t* x;
  int64_t bytes;  // of each

  static const void* of(const void* self, const Product&, int64_t first, int64_t) {
    const Rows& rows = *static_cast<const Rows*>(self);
    return rows.x + first * rows.bytes;
  }
};

template <class X>
int multiply(const Isa& with, const Panels& panels, const X* x, int64_t tokens, Output y,
             const gblm_pool* pool) {
  const Rows rows{reinterpret_cast<const uint8_t*>(x),
                  panels.columns * static_cast<int64_t>(sizeof(X))};
  Product product{panels, tokens, y};
  return multiply_all(with, &product, 1, Source{&rows, Rows::of}, pool);
}

// float32 activations as bf16 rows [tokens * terms, columns]: rounded, then what that left out.
struct Split {
  const float* x;
  uint16_t* rows;
  int64_t columns, terms;
};

void split_token(void* context, int64_t token) {
  const Split& split = *static_cast<const Split*>(context);
  const float* x = split.x + token * split.columns;
  uint16_t* high = split.rows + token * split.terms * split.columns;
  if (split.terms == 1) {
    for (int64_t k = 0; k < split.columns; k++) high[k] = to_bf16(x[k]);
    return;
  }
  uint16_t* low = high + split.columns;
  for (int64_t k = 0; k < split.columns; k++) {
    const uint32_t bits = load<uint32_t>(x + k);
    const bool finite = (bits & 0x7F800000) != 0x7F800000;
    // Cut where rounding would give infinity.
    const bool huge = (bits & 0x7FFFFFFF) >= 0x7F7F8000;
    high[k] = finite && huge ? static_cast<uint16_t>(bits >> 16) : to_bf16(x[k]);
    low[k] = finite ? to_bf16(x[k] - from_bf16(high[k])) : uint16_t{0};
  }
}

struct Add {
  const float* sums;  // [tokens * 2, rows]
  float* y;
  int64_t rows;
};

void add_terms(void* context, int64_t token) {
  const Add& add = *static_cast<const Add*>(context);
  const float* high = add.sums + token * 2 * add.rows;
  float* y = add.y + token * add.rows;
  for (int64_t r = 0; r < add.rows; r++) y[r] = high[r] + high[add.rows + r];
}

struct Gating {
  const float* sums;
  float* y;
  int64_t features;
};

void gate_one(void* context, int64_t token) {
  const Gating& g = *static_cast<const Gating*>(context);
  isa_in_use().gate(g.sums + token * 2 * g.features, g.features, g.y + token * g.features);
}

int multiply_wide(const Panels& panels, const float* x, int64_t tokens, float* y,
                  const gblm_pool* pool) {
  const Isa& with = isa_in_use();
  if (panels.group == 0 && with.wide != nullptr)
    return multiply(*with.wide, panels, x, tokens, Output{nullptr, y}, pool);
  // Integer weights round activations to int8: a second term would change nothing.
  const int64_t terms = panels.group ? 1 : 2;
  const int64_t split_bytes = round_up(tokens * terms * panels.columns * 2, kLine);
  const int64_t sum_bytes = terms == 2 ? tokens * 2 * panels.rows * 4 : 0;
  uint8_t* memory = t_terms.get(split_bytes + sum_bytes);
  if (memory == nullptr) return GBLM_NO_MEMORY;
  Split split{x, reinterpret_cast<uint16_t*>(memory), panels.columns, terms};
  run(pool, tokens, split_token, &split);
  float* sums = terms == 2 ? reinterpret_cast<float*>(memory + split_bytes) : y;
  const int result =
      multiply(with, panels, split.rows, tokens * terms, Output{nullptr, sums}, pool);
  if (result != GBLM_OK || terms == 1) return result;
  Add add{sums, y, panels.rows};
  run(pool, tokens, add_terms, &add);
  return GBLM_OK;
}

}  // namespace

extern "C" {

int gblm_linear(const void* memory, int64_t bytes, const uint16_t* x, int64_t tokens, uint16_t* y,
                const gblm_pool* pool) {
  Panels panels;
  if (const int result = open_panels(memory, bytes, &panels)) return result;
  if (tokens < 0 || (tokens > 0 && (x == nullptr || y == nullptr))) return GBLM_BAD_ARGUMENT;
  for (int64_t t = 0; t < tokens; t += kMaxTokens) {
    const int64_t now = smaller(kMaxTokens, tokens - t);
    const Output rows{y + t * panels.rows, nullptr};
    const int result = multiply(isa_in_use(), panels, x + t * panels.columns, now, rows, pool);
    if (result != GBLM_OK) return result;
  }
  return GBLM_OK;
}

int gblm_linear_f32(const void* memory, int64_t bytes, const float* x, int64_t tokens, float* y,
                    const gblm_pool* pool) {
  Panels panels;
  if (const int result = open_panels(memory, bytes, &panels)) return result;
  if (tokens < 0 || (tokens > 0 && (x == nullptr || y == nullptr))) return GBLM_BAD_ARGUMENT;
  constexpr int64_t together = kMaxTokens / 2;
  for (int64_t t = 0; t < tokens; t += together) {
    const int64_t now = smaller(together, tokens - t);
    const int result =
        multiply_wide(panels, x + t * panels.columns, now, y + t * panels.rows, pool);
    if (result != GBLM_OK) return result;
  }
  return GBLM_OK;
}

void gblm_gate(const float* sums, int64_t tokens, int64_t features, float* y,
               const gblm_pool* pool) {
  Gating gating{sums, y, features};
  run(pool, tokens, gate_one, &gating);
}

const char* gblm_error(int result) {
  switch (result) {
    case GBLM_OK:
      return "no error";
    case GBLM_BAD_ARGUMENT:
      return "an argument is out of range";
    case GBLM_BAD_PANELS:
      return "the panels are damaged, or another version of gblm made them";
    case GBLM_BAD_SOURCE:
      return "masks, offsets and values of the weight do not agree";
    case GBLM_NO_MEMORY:
      return "out of memory";
    default:
      return "unknown error";
  }
}

const char* gblm_compiler(void) {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}

}  // extern "C"
