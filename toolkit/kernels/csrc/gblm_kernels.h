/* Sparse and dense linear layers on CPU: a plain C ABI, without PyTorch or ONNX Runtime.
 *
 * A weight [rows, columns] is turned once into panels (gblm_prepare) and then multiplied
 * (gblm_linear). Panels are one block of bytes without pointers; see panels.h for their layout.
 * No function trusts panels: damaged ones give an error, never a read outside of them.
 */
#ifndef GBLM_KERNELS_H
#define GBLM_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define GBLM_API __declspec(dllexport)
#else
#define GBLM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Stored values. Integers are codes; the weight is code * scale of its group. */
enum { GBLM_BF16 = 0, GBLM_INT8 = 1, GBLM_INT4 = 2 };
/* Which positions are stored: all; any; four of every eight columns, 2:4 among them; eight of every
 * sixteen, three to five of them in each half. */
enum { GBLM_DENSE = 0, GBLM_ANY = 1, GBLM_4_OF_8 = 2, GBLM_8_OF_16 = 3 };
/* Results. */
enum {
  GBLM_OK = 0,
  GBLM_BAD_ARGUMENT = 1,
  GBLM_BAD_PANELS = 2,
  GBLM_BAD_SOURCE = 3,
  GBLM_NO_MEMORY = 4
};

/* A thread pool of the host: run(self, n, task, context) calls task(context, i) for 0 <= i < n. */
typedef struct {
  void* self;
  int (*threads)(void* self);
  void (*run)(void* self, int64_t tasks, void (*task)(void* context, int64_t index), void* context);
} gblm_pool;

/* A weight as it lies on disk (docs/format.md). */
typedef struct {
  int64_t rows,
      columns; /* columns: a multiple of 8, of 16 for GBLM_8_OF_16; of `group` for integers */
  int32_t values, mask; /* GBLM_BF16.. and GBLM_DENSE.. */
  int64_t group;        /* columns per scale; 0 for bf16 */
  const void* data;     /* bf16, int8, or int4 two a byte; row after row */
  int64_t data_bytes;
  const uint8_t* bitmask; /* [rows, columns / 8], bit i of byte b is column 8 b + i */
  const int64_t* starts;  /* [rows + 1] first byte of each row in `data` */
  const uint16_t* scales; /* bf16 [rows, columns / group] */
} gblm_source;

/* The gated MLPs of a mixture of experts: panels of all of them in one block of memory. */
typedef struct {
  const uint8_t* memory;
  int64_t bytes;
  const int64_t* places; /* [experts][3][2]: first byte and bytes of gate, up and down */
  int64_t experts, columns;
} gblm_layer;

/* What panels say about themselves. */
typedef struct {
  int64_t rows, columns, group, bytes;
  int32_t values, mask;
} gblm_info;

/* Bytes that the panels of a source take; also checks the source. */
GBLM_API int gblm_panels_bytes(const gblm_source* source, const gblm_pool* pool, int64_t* bytes);
/* Disk layout to panels, in parallel. `panels` is 64-byte aligned and `bytes` long. */
GBLM_API int gblm_prepare(const gblm_source* source, const gblm_pool* pool, void* panels,
                          int64_t bytes);
/* Header and offsets alone. */
GBLM_API int gblm_inspect(const void* panels, int64_t bytes, gblm_info* info);
/* The inverse of gblm_prepare: values [rows, columns] (bf16, or one int8 code each), their mask
 * [rows, columns] (0 or 1) and scales [rows, columns / group] of the group in the panels. */
GBLM_API int gblm_unpack(const void* panels, int64_t bytes, void* values, uint8_t* mask,
                         uint16_t* scales);
/* y [tokens, rows] = x [tokens, columns] W^T, both bf16 and contiguous. Integer weights meet
 * activations that are rounded to int8, per token and group. */
GBLM_API int gblm_linear(const void* panels, int64_t bytes, const uint16_t* x, int64_t tokens,
                         uint16_t* y, const gblm_pool* pool);

/* The same for float32; sums are not rounded. On AMX x counts as two bf16 terms where weights are
 * bf16, which hold 16 of its 24 bits. */
GBLM_API int gblm_linear_f32(const void* panels, int64_t bytes, const float* x, int64_t tokens,
                             float* y, const gblm_pool* pool);

/* y [tokens, features] = silu(gate) * up, of sums [tokens, 2 * features]: gates, then ups. */
GBLM_API void gblm_gate(const float* sums, int64_t tokens, int64_t features, float* y,
                        const gblm_pool* pool);

/* y [tokens, columns] = sum of share * down(silu(gate(x)) * up(x)) over the experts that each token
 * has chosen; `ids` and `shares` are [tokens, chosen], and a negative id is no expert. Products are
 * those of gblm_linear, and they and silu * up are rounded to bf16; the sum is rounded once. */
GBLM_API int gblm_experts(const gblm_layer* layer, const uint16_t* x, int64_t tokens,
                          const int32_t* ids, const float* shares, int64_t chosen, uint16_t* y,
                          const gblm_pool* pool);

GBLM_API const char* gblm_error(int result);
/* The instruction set in use: "amx", "avx512", "avx2" or "portable". */
GBLM_API const char* gblm_isa(void);
/* Take another instruction set, for tests and benchmarks; an error if this CPU lacks it. */
GBLM_API int gblm_use_isa(const char* name);
/* The compiler that built this library. */
GBLM_API const char* gblm_compiler(void);
/* Seconds to read this memory once with every thread of the pool: the limit of all decoding. */
GBLM_API double gblm_read_seconds(const void* memory, int64_t bytes, const gblm_pool* pool);

#ifdef __cplusplus
}
#endif
#endif
