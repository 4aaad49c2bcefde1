// Takes the place of ptx.cuh: what the kernels need of a GPU, on one CPU core. The part of it that
// does not depend on a kernel is in libcuda.cpp.
//
// mma.sp is written from the fragment tables of the PTX ISA, 9.7.14.6.

using uintptr = unsigned long;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define DEVICE static inline

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Place {
  unsigned x;
};
DEVICE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
DEVICE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
DEVICE int min(int a, int b) { return a < b ? a : b; }
DEVICE int max(int a, int b) { return a > b ? a : b; }

namespace emulator {
struct Warp {
  int arrived;
  unsigned turn;
  unsigned a[32][4], b[32][4], meta[32];
  float value[32];
};
// In libcuda.cpp.
Place& thread_index();
Place& block_index();
Place& grid_size();
Warp& warp();
char* shared();
void fail(const char* what, int detail);
bool may_access(uintptr at, int bytes, bool write);
void meet_block();
void meet_warp();
int run(unsigned grid, unsigned block, unsigned shared, void (*body)(void**), void** values);

DEVICE int lane() { return thread_index().x % 32; }

template <class T>
T read(const T* at) {
  return may_access((uintptr)at, sizeof(T), false) ? *at : T{};
}
template <class T>
void write(T* at, T value) {
  if (may_access((uintptr)at, sizeof(T), true)) *at = value;
}
template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
DEVICE unsigned float_to_bf16(float value) {
  const unsigned bits = same_bits<unsigned>(value);
  return value == value ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FFF;
}

template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct Count : Count<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct Count<0, kIndex...> {
  using Type = Indices<kIndex...>;
};
template <class... A, int... kIndex>
void apply(void (*kernel)(A...), void** values, Indices<kIndex...>) {
  kernel(*(A*)values[kIndex]...);
}
template <class... A>
void apply(void (*kernel)(A...), void** values) {
  apply(kernel, values, typename Count<sizeof...(A)>::Type());
}
}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define gridDim (emulator::grid_size())

DEVICE void __syncthreads() { emulator::meet_block(); }
DEVICE uint4 load16_once(const uint4* p) { return emulator::read(p); }
DEVICE uint2 load8_once(const uint2* p) { return emulator::read(p); }
DEVICE unsigned load4_once(const unsigned* p) { return emulator::read(p); }
DEVICE uint4 load16(const uint4* p) { return emulator::read(p); }
DEVICE unsigned load4(const unsigned* p) { return emulator::read(p); }
DEVICE unsigned load2(const unsigned short* p) { return emulator::read(p); }
DEVICE void store16(uint4* p, uint4 v) { emulator::write(p, v); }
DEVICE void store8(uint2* p, uint2 v) { emulator::write(p, v); }
DEVICE void store2(unsigned short* p, unsigned v) { emulator::write(p, (unsigned short)v); }
DEVICE void* dynamic_shared() { return emulator::shared(); }

DEVICE float bf16_to_float(unsigned bits) { return emulator::same_bits<float>(bits << 16); }
DEVICE float to_float(unsigned bits) {
  return BF16 ? bf16_to_float(bits) : (float)emulator::same_bits<_Float16>((unsigned short)bits);
}
DEVICE unsigned from_float(float value) {
  return BF16 ? emulator::float_to_bf16(value)
              : emulator::same_bits<unsigned short>((_Float16)value);
}
DEVICE unsigned add_pairs(unsigned a, unsigned b) {
  return from_float(to_float(a & 0xFFFF) + to_float(b & 0xFFFF)) |
         from_float(to_float(a >> 16) + to_float(b >> 16)) << 16;
}
DEVICE unsigned pick_byte(unsigned word, int which) { return word >> 8 * which & 255; }

DEVICE float add_over_warp(float value) {
  emulator::Warp& warp = emulator::warp();
  for (int distance = 16; distance; distance >>= 1) {
    warp.value[emulator::lane()] = value;
    emulator::meet_warp();
    value += warp.value[emulator::lane() ^ distance];
    emulator::meet_warp();
  }
  return value;
}

// C/D: lane 4g + t holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) of 16 x 8.
// A: of row r, lane 4(r mod 8) + j holds the two kept values of the groups j and j + 4 of four
//   columns, in the registers r / 8 and 2 + r / 8.
// B: row k of column n is in lane 4n + (k mod 8) / 2, register k / 8, half k mod 2.
// Metadata: lane 4(r mod 8) + 2 * half + k / 16, half word r / 8, a nibble for each group of four.
template <int kHalf>
DEVICE void mma_sparse(float* sum, const unsigned* a, const unsigned* b, unsigned meta) {
  emulator::Warp& warp = emulator::warp();
  const int lane = emulator::lane();
  __builtin_memcpy(warp.a[lane], a, 16);
  __builtin_memcpy(warp.b[lane], b, 16);
  warp.meta[lane] = meta;
  emulator::meet_warp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double total = sum[i];
    for (int group = 0; group < 8; group++) {
      const unsigned word = warp.meta[row % 8 * 4 + 2 * kHalf + group / 4];
      const unsigned nibble = word >> (16 * (row / 8) + 4 * (group % 4)) & 15;
      if ((nibble & 3) >= nibble >> 2) emulator::fail("metadata out of order", nibble);
      const unsigned kept = warp.a[row % 8 * 4 + group % 4][row / 8 + group / 4 * 2];
      for (int e = 0; e < 2; e++) {
        const int k = 4 * group + (e ? nibble >> 2 : nibble & 3);
        const unsigned pair = warp.b[4 * column + k % 8 / 2][k / 8];
        total += (double)to_float(kept >> 16 * e & 0xFFFF) * to_float(pair >> k % 2 * 16 & 0xFFFF);
      }
    }
    sum[i] = (float)total;
  }
  emulator::meet_warp();
}

// What the emulated driver looks up in place of a kernel.
#define KERNEL(name)                                                                               \
  extern "C" int emulate_##name(unsigned grid, unsigned block, unsigned shared, void** values) {   \
    return emulator::run(grid, block, shared, [](void** v) { emulator::apply(name, v); }, values); \
  }
