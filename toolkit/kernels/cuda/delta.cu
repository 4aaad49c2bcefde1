// x [tokens, columns] @ W.T -> y [tokens, rows] for W [rows, columns] with any mask: the work is
// per kept value, not per column.
//
// A row is 32 runs, one a lane, of words of 8 kept values each. A value's place is the distance
// from the one before, less one, in 4 bits; longer ways are filled up with zeros.
//
//   values [word][lane][16 B]   8 values, 16-bit
//   gaps   [word][lane] u32     nibble i: distance of value i from the one before, less 1
//   starts [row][lane] u16      column before the run, plus 1
//   words  [rows + 1] s32       first word of a row
//   x      16-bit [tokens][columns]; in shared memory [padded][TOKENS], zero behind the columns
//
// The end of a last run is filled with zeros at distance 1, which walk on behind the columns: no
// more than columns / 32 + 8 of them, `padded` has room for that.
//
// Defined by the compiler's command line:
//   BF16    1: bfloat16, 0: float16
//   TOKENS  1, 2, 4, 8
//
// Tuned for nothing yet: no GPU has run it.

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// Eight columns of every token, turned so that a column's tokens are neighbours.
DEVICE void stage(unsigned* shared, const unsigned short* x, int tokens, int columns, int padded) {
  for (int part = threadIdx.x; part < padded / 8; part += kThreads) {
    unsigned in[TOKENS][4];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (t < tokens && 8 * part < columns)
        v = load16((const uint4*)(x + (long)t * columns + 8 * part));
      in[t][0] = v.x, in[t][1] = v.y, in[t][2] = v.z, in[t][3] = v.w;
    }
    unsigned* to = shared + part * 4 * TOKENS;
#pragma unroll
    for (int i = 0; i < 4 * TOKENS; i++) {
#if TOKENS == 1
      to[i] = in[0][i];
#else
      const int column = 2 * i / TOKENS, token = 2 * i % TOKENS, shift = column % 2 * 16;
      to[i] = (in[token][column / 2] >> shift & 0xFFFF) |
              (in[token + 1][column / 2] >> shift & 0xFFFF) << 16;
#endif
    }
  }
}

// sums[t] += weight * x[t, column]
DEVICE void add_column(float* sums, float weight, const void* shared, int column) {
#if TOKENS == 1
  sums[0] += weight * to_float(((const unsigned short*)shared)[column]);
#else
  unsigned words[TOKENS / 2];
#if TOKENS == 8
  const uint4 all = ((const uint4*)shared)[column];
  words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
#elif TOKENS == 4
  const uint2 all = ((const uint2*)shared)[column];
  words[0] = all.x, words[1] = all.y;
#else
  words[0] = ((const unsigned*)shared)[column];
#endif
#pragma unroll
  for (int t = 0; t < TOKENS; t += 2) {
    sums[t] += weight * to_float(words[t / 2] & 0xFFFF);
    sums[t + 1] += weight * to_float(words[t / 2] >> 16);
  }
#endif
}

// Eight kept values; returns how many columns they span.
DEVICE int add_word(float* sums, uint4 values, unsigned gaps, const void* shared, int column) {
  const unsigned even = gaps & 0x0F0F0F0Fu, odd = gaps >> 4 & 0x0F0F0F0Fu;
  // Byte j: columns from the run's begin to value 2j + 1, and to value 2j. No byte overflows: at
  // most 8 * 16.
  const unsigned to_odd = (even + odd) * 0x01010101u + 0x08060402u;
  const unsigned to_even = to_odd - odd - 0x01010101u;
  const unsigned pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    add_column(sums, to_float(pairs[j] & 0xFFFF), shared, column + pick_byte(to_even, j));
    add_column(sums, to_float(pairs[j] >> 16), shared, column + pick_byte(to_odd, j));
  }
  return to_odd >> 24;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    delta(const uint4* values, const unsigned* gaps, const unsigned short* starts,
          const int* words, const unsigned short* x, unsigned short* y, int tokens, int rows,
          int columns, int padded) {
  void* shared = dynamic_shared();
  stage((unsigned*)shared, x, tokens, columns, padded);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < rows; row += gridDim.x * kWarps) {
    const int begin = load4((const unsigned*)words + row);
    const int end = load4((const unsigned*)words + row + 1);
    int column = (int)load2(starts + row * 32l + lane) - 1;
    float sums[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) sums[t] = 0;
#pragma unroll 4
    for (int word = begin; word < end; word++)
      column += add_word(sums, load16_once(values + word * 32l + lane),
                         load4_once(gaps + word * 32l + lane), shared, column);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const float sum = add_over_warp(sums[t]);
      if (lane == 0 && t < tokens) store2(y + (long)t * rows + row, from_float(sum));
    }
  }
}

// The dense weight [rows, columns], which must be zero before: for many tokens. A warp takes a row.
// Values that fill up a long way are zeros at places of their own, behind the columns they are not
// stored.
extern "C" __global__ void __launch_bounds__(kThreads)
    scatter(const uint4* values, const unsigned* gaps, const unsigned short* starts,
            const int* words, unsigned short* dense, int rows, int columns) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int begin = load4((const unsigned*)words + row);
  const int end = load4((const unsigned*)words + row + 1);
  int column = (int)load2(starts + row * 32l + lane) - 1;
  for (int word = begin; word < end; word++) {
    const uint4 all = load16_once(values + word * 32l + lane);
    const unsigned pairs[4] = {all.x, all.y, all.z, all.w};
    const unsigned distances = load4_once(gaps + word * 32l + lane);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      column += (distances >> 4 * i & 15) + 1;
      const unsigned value = pairs[i / 2] >> i % 2 * 16 & 0xFFFF;
      if (value && column < columns) store2(dense + (long)row * columns + column, value);
    }
  }
}
