// x [tokens, columns] @ W.T -> y [tokens, rows] for 2:4 weights W [rows, columns] that stay
// compressed: values and metadata go into the sparse tensor core as they lie in memory.
//
// A weight is tiles of 16 rows x 64 columns (a step); steps make units, which hold whole groups.
// The weight is the sparse operand A of mma.sp.m16n8k32, the tokens are B, eight at a time.
//
//   values  [tile][step][half][lane][16 B]  16-bit: registers a0..a3 of a half (32 columns)
//           [tile][step][lane][16 B]        int8: bytes; word 2h + r holds a(2r), a(2r+1)
//           [tile][step][lane][8 B]         int4: word h; a(r) is its bits 4r and 16 + 4r
//   meta    [tile][step][lane] u32          lane 4g + 2h + b: columns 32h + 16b..+15 of row g in
//                                           the low half word, of row g + 8 in the high one
//   scales  [tile][group][16]               bf16
//   x       16-bit [tokens][columns], or what `repack` makes of it
//
// Defined by the compiler's command line:
//   BF16      1: bfloat16, 0: float16 activations
//   TOKENS    blocks of 8 tokens: 1, 2, 4, 8
//   VALUES    16: as activations, 8: int8, 4: int4
//   GROUP     columns that share a scale; 0: all of a row
//   TAIL      1: columns do not fill the last unit
//   REPACKED  1: x was rearranged by `repack`
//
// Tuned for nothing yet: no GPU has run it.

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kUnit = GROUP == 0 ? 64 : GROUP % 64 == 0 ? GROUP : 2 * GROUP;
constexpr int kSteps = kUnit / 64;
constexpr int kUnroll = kSteps >= 4 ? 1 : 4 / kSteps;
constexpr int kGroups = GROUP == 0 ? 0 : kUnit / (GROUP == 0 ? 1 : GROUP);
constexpr bool kCodes = VALUES != 16;

// The largest power of two in whose binade codes count in ones, as a pair of 16-bit floats; and
// the same, negative, less 8.
#if BF16
constexpr unsigned kCounting = 0x43004300u, kMinusEight = 0xC308C308u;
#else
constexpr unsigned kCounting = 0x64006400u, kMinusEight = 0xE408E408u;
#endif

DEVICE float read_scale(const void* scales, long index) {
  return bf16_to_float(load2((const unsigned short*)scales + index));
}

// Two int8 codes, in the low bytes of the half words, as 16-bit floats: the lower seven bits count
// upward from a power of two, which is taken off again, and as much once more if the code is
// negative. In bfloat16 the sign bit doubles the power to take off; in float16 it adds its ulps.
DEVICE unsigned widen_bytes(unsigned pair) {
#if BF16
  return add_pairs((pair & 0x007F007Fu) | 0x43004300u, (pair & 0x00800080u) | 0xC300C300u);
#else
  return add_pairs((pair & 0x007F007Fu) | 0x64006400u, (pair & 0x00800080u) | 0xE400E400u);
#endif
}

// The values of one step: `a` gets the registers of both halves.
struct Raw {
#if VALUES == 16
  uint4 low, high;
#elif VALUES == 8
  uint4 all;
#else
  uint2 all;
#endif
};

DEVICE Raw read_values(const void* values, long step, int lane) {
#if VALUES == 16
  const uint4* from = (const uint4*)values + step * 64 + lane;
  return {load16_once(from), load16_once(from + 32)};
#elif VALUES == 8
  return {load16_once((const uint4*)values + step * 32 + lane)};
#else
  return {load8_once((const uint2*)values + step * 32 + lane)};
#endif
}

template <int kHalf>
DEVICE void widen(const Raw& raw, unsigned* a) {
#if VALUES == 16
  const uint4 words = kHalf ? raw.high : raw.low;
  a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
#elif VALUES == 8
  const unsigned words[2] = {kHalf ? raw.all.z : raw.all.x, kHalf ? raw.all.w : raw.all.y};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    a[2 * i] = widen_bytes(words[i]);
    a[2 * i + 1] = widen_bytes(words[i] >> 8);
  }
#else
  const unsigned word = kHalf ? raw.all.y : raw.all.x;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const unsigned counting = ((word >> 4 * i) & 0x000F000Fu) | kCounting;
    a[i] = add_pairs(counting, kMinusEight);
  }
#endif
}

// Registers b0..b3: columns `column` + 8i + 2t and the next one, of token g of the block.
DEVICE void read_tokens(const void* x, int columns, int token, int column, int lane, unsigned* b) {
  const unsigned* pairs = (const unsigned*)x + ((long)token * columns + column) / 2 + lane % 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const bool inside = !TAIL || column + 8 * i < columns;
    b[i] = inside ? load4(pairs + 4 * i) : 0;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    repack(const unsigned short* x, uint4* fragments, int tokens, int columns) {
  const int index = blockIdx.x * kThreads + threadIdx.x, lane = index % 32;
  const int block = index / 32 % TOKENS, half = index / (32 * TOKENS);
  if (half >= (columns + kUnit - 1) / kUnit * kSteps * 2) return;
  const int token = 8 * block + lane / 4;
  unsigned b[4] = {0, 0, 0, 0};
  if (token < tokens) read_tokens(x, columns, token, 32 * half, lane, b);
  store16(fragments + index, make_uint4(b[0], b[1], b[2], b[3]));
}

template <int kHalf>
DEVICE void multiply(float (*sums)[4], const unsigned* a, unsigned meta, const void* x, int tokens,
                     int columns, int step, int lane) {
#pragma unroll
  for (int block = 0; block < TOKENS; block++) {
    unsigned b[4];
#if REPACKED
    const long index = ((long)(2 * step + kHalf) * TOKENS + block) * 32 + lane;
    const uint4 words = load16((const uint4*)x + index);
    b[0] = words.x, b[1] = words.y, b[2] = words.z, b[3] = words.w;
#else
    // Tokens past the end repeat the last one; their sums are never stored.
    const int token = min(8 * block + lane / 4, tokens - 1);
    read_tokens(x, columns, token, 64 * step + 32 * kHalf, lane, b);
#endif
    mma_sparse<kHalf>(sums[block], a, b, meta);
  }
}

DEVICE void clear(float (*sums)[4]) {
#pragma unroll
  for (int i = 0; i < 4 * TOKENS; i++) sums[i / 4][i % 4] = 0;
}

DEVICE void add_scaled(float (*sums)[4], float (*codes)[4], float top, float bottom) {
#pragma unroll
  for (int i = 0; i < 4 * TOKENS; i++)
    sums[i / 4][i % 4] += (i % 4 < 2 ? top : bottom) * codes[i / 4][i % 4];
}

// Adds one unit of columns to the sums. `top` and `bottom` are those of the row if GROUP is 0.
DEVICE void add_unit(float (*sums)[4], const void* values, const unsigned* meta,
                     const void* scales, const void* x, int tokens, int columns, int units,
                     int unit, float top, float bottom) {
  const int lane = threadIdx.x % 32;
  float codes[TOKENS][4];
#pragma unroll
  for (int within = 0; within < kSteps; within++) {
    const int step = unit * kSteps + within;
    const long at = (long)blockIdx.x * units * kSteps + step;
    const Raw raw = read_values(values, at, lane);
    const unsigned bits = load4_once(meta + at * 32 + lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
#if GROUP
      const int column = 64 * within + 32 * half;
      if (column % GROUP == 0) {
        const long group = ((long)blockIdx.x * units + unit) * kGroups + column / GROUP;
        top = read_scale(scales, group * 16 + lane / 4);
        bottom = read_scale(scales, group * 16 + lane / 4 + 8);
        clear(codes);
      }
#endif
      unsigned a[4];
      float(*into)[4] = GROUP ? codes : sums;
      if (half == 0) {
        widen<0>(raw, a);
        multiply<0>(into, a, bits, x, tokens, columns, step, lane);
      } else {
        widen<1>(raw, a);
        multiply<1>(into, a, bits, x, tokens, columns, step, lane);
      }
#if GROUP
      if ((column + 32) % GROUP == 0) add_scaled(sums, codes, top, bottom);
#endif
    }
  }
}

// The warps of a block share the columns of its 16 rows.
extern "C" __global__ void __launch_bounds__(kThreads)
    mma_sp(const void* values, const unsigned* meta, const void* scales, const void* x,
           unsigned short* y, int tokens, int rows, int columns) {
  __shared__ float parts[kWarps][TOKENS][32][4];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int units = (columns + kUnit - 1) / kUnit;
  float sums[TOKENS][4];
  clear(sums);
  float top = 1, bottom = 1;
  if (kCodes && GROUP == 0) {
    top = read_scale(scales, blockIdx.x * 16l + lane / 4);
    bottom = read_scale(scales, blockIdx.x * 16l + lane / 4 + 8);
  }
#pragma unroll kUnroll
  for (int unit = warp; unit < units; unit += kWarps)
    add_unit(sums, values, meta, scales, x, tokens, columns, units, unit, top, bottom);
#pragma unroll
  for (int i = 0; i < 4 * TOKENS; i++)
    parts[warp][i / 4][lane][i % 4] = sums[i / 4][i % 4] * (i % 4 < 2 ? top : bottom);
  __syncthreads();
  for (int i = threadIdx.x; i < 128 * TOKENS; i += kThreads) {
    const int row = i % 16, token = i / 16;
    const int from = row % 8 * 4 + token % 8 / 2, part = row / 8 * 2 + token % 2;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += parts[w][token / 8][from][part];
    if (token < tokens && blockIdx.x * 16 + row < rows)
      store2(y + (long)token * rows + blockIdx.x * 16 + row, from_float(sum));
  }
}

// The dense weight [rows, columns] in the dtype of the activations, rounded once: for many tokens.
// A warp takes one step of one tile.
extern "C" __global__ void __launch_bounds__(kThreads)
    expand(const void* values, const unsigned* meta, const void* scales, unsigned short* dense,
           int rows, int columns) {
  const int lane = threadIdx.x % 32, steps = (columns + kUnit - 1) / kUnit * kSteps;
  const long at = (long)blockIdx.x * kWarps + threadIdx.x / 32;
  const int tile = at / steps, step = at % steps;
  if (tile >= (rows + 15) / 16) return;
  const Raw raw = read_values(values, at, lane);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float scale[2] = {1, 1};
    if (kCodes) {
      const int span = GROUP ? GROUP : 1, column = 64 * step + 32 * half;
      const long group = GROUP ? (long)tile * (steps * 64 / span) + column / span : tile;
      scale[0] = read_scale(scales, group * 16 + lane / 4);
      scale[1] = read_scale(scales, group * 16 + lane / 4 + 8);
    }
    unsigned a[4];
    if (half == 0)
      widen<0>(raw, a);
    else
      widen<1>(raw, a);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = 16 * tile + lane / 4 + 8 * (i % 2);
      const int column = 64 * step + 32 * half + 16 * (i / 2) + 4 * (lane % 4);
      const unsigned bits = load4(meta + at * 32 + lane / 4 * 4 + 2 * half + i / 2);
      const unsigned places = bits >> (16 * (i % 2) + 4 * (lane % 4));
      unsigned first = a[i] & 0xFFFF, second = a[i] >> 16;
      if (kCodes) {
        // Adding zero makes +0 of what was rounded to -0.
        const float factor = scale[i % 2];
        first = from_float(to_float(from_float(to_float(first) * factor)) + 0.f);
        second = from_float(to_float(from_float(to_float(second) * factor)) + 0.f);
      }
      const unsigned long long pair = (unsigned long long)first << 16 * (places & 3) |
                                      (unsigned long long)second << 16 * (places >> 2 & 3);
      if (row < rows && column < columns)
        store8((uint2*)(dense + (long)row * columns + column),
               make_uint2((unsigned)pair, (unsigned)(pair >> 32)));
    }
  }
}
