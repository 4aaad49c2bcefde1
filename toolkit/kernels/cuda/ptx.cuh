// What the kernels need of the machine: loads, stores, three arithmetic instructions on pairs of
// 16-bit floats, and the sparse tensor core. Everything else is plain C++, so that tests can put
// another set of these functions in front of the same kernels and run them on a CPU.
//
// Defined by the compiler's command line: BF16 (1: bfloat16, 0: float16 activations).

#define DEVICE static __device__ __forceinline__

// Weights are read once a call: they shall not push activations out of the first-level cache.
DEVICE uint4 load16_once(const uint4* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

DEVICE uint2 load8_once(const uint2* p) {
  uint2 r;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
  return r;
}

DEVICE unsigned load4_once(const unsigned* p) {
  unsigned r;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
}

DEVICE uint4 load16(const uint4* p) { return __ldg(p); }
DEVICE unsigned load4(const unsigned* p) { return __ldg(p); }
DEVICE unsigned load2(const unsigned short* p) { return __ldg(p); }
DEVICE void store16(uint4* p, uint4 v) { *p = v; }
DEVICE void store8(uint2* p, uint2 v) { *p = v; }
DEVICE void store2(unsigned short* p, unsigned v) { *p = (unsigned short)v; }

DEVICE unsigned pick_byte(unsigned word, int which) { return __byte_perm(word, 0, 0x4440 + which); }

// As many bytes as the launch asks for.
DEVICE void* dynamic_shared() {
  extern __shared__ uint4 dynamic_memory[];
  return dynamic_memory;
}

// Sums of two pairs of 16-bit floats; fma, because sm_80 has no addition of bfloat16.
DEVICE unsigned add_pairs(unsigned a, unsigned b) {
  unsigned r;
#if BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3F803F80u), "r"(b));
#else
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#endif
  return r;
}

// The 16-bit float in the low half of a word.
DEVICE float to_float(unsigned bits) {
#if BF16
  return __uint_as_float(bits << 16);
#else
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((unsigned short)bits));
  return r;
#endif
}

// Rounded to nearest, ties to even.
DEVICE unsigned from_float(float value) {
  unsigned short r;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(value));
#endif
  return r;
}

DEVICE float bf16_to_float(unsigned bits) { return __uint_as_float(bits << 16); }

// sum[16 x 8] += A[16 x 32, 2:4] @ B[32 x 8]; half h of a step reads the metadata of the lanes
// 4g + 2h and 4g + 2h + 1.
template <int kHalf>
DEVICE void mma_sparse(float* sum, const unsigned* a, const unsigned* b, unsigned meta) {
#if BF16
#define TYPES "f32.bf16.bf16.f32"
#else
#define TYPES "f32.f16.f16.f32"
#endif
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col." TYPES
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                 "r"(b[3]), "r"(meta), "n"(kHalf));
}

DEVICE float add_over_warp(float value) {
#pragma unroll
  for (int distance = 16; distance; distance >>= 1)
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}
