// AVX-512: from the bytes of a block to words in registers, and their dot products.
#pragma once

#include "planes.h"

namespace {

// Prefetch distances in bytes. On Zen: the more work a byte makes, the further ahead. Zen 4 alone
// reads the weights of one token faster when nothing is asked.
constexpr int64_t zen_ahead(int mask) { return mask == GBLM_DENSE ? 6144 : 12288; }

// Zen is fastest past the caches: weights are read once a token. Intel keeps too few such lines in
// flight and would read at half its speed.
template <class Reader>
INLINE void prefetch_line(const uint8_t* bytes, int line) {
  const char* at = reinterpret_cast<const char*>(bytes) + kLine * line;
  if (kOnZen)
    _mm_prefetch(at + Reader::kZenAhead, _MM_HINT_NTA);
  else
    _mm_prefetch(at + kAhead, _MM_HINT_T0);
}
// g++ gathers the requests of a block, which then wait for each other; clang spreads them itself.
#if defined(__clang__)
constexpr bool kSpread = false;
#else
constexpr bool kSpread = true;
#endif
template <class Reader, bool Ask>
INLINE void prefetch(const uint8_t* bytes) {
  if constexpr (Ask)
    unroll<Reader::kLines>([&](auto i) LAMBDA { prefetch_line<Reader>(bytes, i); });
}
// Expanding in place: on Zen 4 the instruction waits for the old value of its destination.
INLINE __m512i expand16(uint32_t mask, __m512i word) {
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(word) : "Yk"(static_cast<__mmask32>(mask)));
  return word;
}
// What is not kept is a zero + 128.
INLINE __m512i expand8(uint64_t mask, __m512i word) {
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(0x80));
  return _mm512_mask_expand_epi8(zero, static_cast<__mmask64>(mask), word);
}
INLINE __m512i load512(const void* at) { return _mm512_loadu_si512(at); }
INLINE __m512i load256(const void* at) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
}

// 64 bytes from anywhere: two halves are faster than one load that crosses a line on Zen 5.
INLINE __m512i load_split(const uint8_t* at) {
#if defined(__AMX_TILE__)  // Intel alone: one load is
  return load512(at);
#endif
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32));
  return _mm512_inserti64x4(load256(at), high, 1);
}

// The bytes of one word; of two, for int4.
template <int Mask>
INLINE __m512i load_packed(const uint8_t* at) {
  return Mask == GBLM_ANY ? load_split(at) : load512(at);
}

// Readers call visit(word, register) for every word of a block and return where the block ends.
// `Ask`: whether they ask ahead for the blocks that follow.

template <int Mask>
struct Bf16 {
  static constexpr int kWords = 16;
  static constexpr bool kInPlace = Mask == GBLM_DENSE;
  static constexpr int kLines = Mask == GBLM_DENSE ? 16 : 9;
  static constexpr int64_t kZenAhead = zen_ahead(Mask);

  template <bool Ask = true, class Visit>
  static INLINE const uint8_t* block(const uint8_t* at, Visit&& visit) {
    if constexpr (Mask == GBLM_DENSE) {
      if constexpr (!kSpread) prefetch<Bf16, Ask>(at);
      unroll<kWords>([&](auto w) LAMBDA {
        if constexpr (kSpread && Ask) {
          prefetch_line<Bf16>(at, w);
          asm volatile("" ::: "memory");
        }
        visit(w, load512(at + kLine * w));
      });
      return at + kWords * kLine;
    } else {
      prefetch<Bf16, Ask>(at);
      const uint8_t* v = at + kMaskBytes;
      unroll<kWords>([&](auto w) LAMBDA {
        const uint32_t mask = load<uint32_t>(at + 4 * w);
        visit(w, expand16(mask, load_split(v)));
        v += 2 * _mm_popcnt_u32(mask);
      });
      return v;
    }
  }
};

template <int Mask>
struct Int8 {
  static constexpr int kWords = 8;
  static constexpr bool kInPlace = Mask == GBLM_DENSE;
  static constexpr int kLines = Mask == GBLM_DENSE ? 8 : 5;
  static constexpr int64_t kZenAhead = zen_ahead(Mask);
  static constexpr int kShift = 0;

  template <bool Ask = true, class Visit>
  static INLINE const uint8_t* block(const uint8_t* at, Visit&& visit) {
    prefetch<Int8, Ask>(at);
    const uint8_t* v = Mask == GBLM_DENSE ? at : at + kMaskBytes;
    unroll<kWords>([&](auto w) LAMBDA {
      if constexpr (Mask == GBLM_DENSE) {
        visit(w, load512(v));
        v += 64;
      } else {
        const uint64_t mask = load<uint64_t>(at + 8 * w);
        visit(w, expand8(mask, load_packed<Mask>(v)));
        v += _mm_popcnt_u64(mask);
      }
    });
    return v;
  }
};

// Nibbles, codes + 8, become bytes: 16 times their code, + 128.
template <int Mask>
struct Int4 {
  static constexpr int kWords = 8;
  static constexpr bool kInPlace = false;
  static constexpr int kLines = Mask == GBLM_DENSE ? 4 : 3;
  static constexpr int64_t kZenAhead = zen_ahead(Mask);
  static constexpr int kShift = 4;

  template <bool Ask = true, class Visit>
  static INLINE const uint8_t* block(const uint8_t* at, Visit&& visit) {
    prefetch<Int4, Ask>(at);
    const __m512i high = _mm512_set1_epi8(static_cast<char>(0xF0));
    const uint8_t* v = Mask == GBLM_DENSE ? at : at + kMaskBytes;
    unroll<kWords / 2>([&](auto i) LAMBDA {
      constexpr std::integral_constant<int, 2 * i> even;
      constexpr std::integral_constant<int, 2 * i + 1> odd;
      const __m512i both = load_packed<Mask>(v);
      const __m512i low = _mm512_and_si512(_mm512_slli_epi16(both, 4), high);
      const __m512i top = _mm512_and_si512(both, high);
      if constexpr (Mask == GBLM_DENSE) {
        visit(even, low);
        visit(odd, top);
        v += 64;
      } else {
        const uint64_t a = load<uint64_t>(at + 16 * i), b = load<uint64_t>(at + 16 * i + 8);
        visit(even, expand8(a, low));
        visit(odd, expand8(b, top));
        v += larger(_mm_popcnt_u64(a), _mm_popcnt_u64(b));
      }
    });
    return v;
  }
};

// Dot products: weights are bf16 pairs or bytes + 128, activations bf16 pairs or signed bytes.

INLINE __m512 broadcast_bf16(const uint32_t* x, __m512i w, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(*x)));
}
// g++ keeps arrays of sums in registers only if they are read and written as this one type.
typedef int32_t Ints __attribute__((vector_size(64)));

INLINE Ints multiply_int8(__m512i x, __m512i w, Ints sum) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, w, x);
}
INLINE Ints broadcast_int8(const uint32_t* x, __m512i w, Ints sum) {
  return multiply_int8(_mm512_set1_epi32(static_cast<int>(*x)), w, sum);
}
INLINE Ints broadcast_int(int32_t x) { return (Ints)_mm512_set1_epi32(x); }
template <int Shift>
INLINE __m512 group_scales(const uint8_t* scales) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)scales));
  return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)),
                       _mm512_set1_ps(1.0f / (1 << Shift)));
}

}  // namespace
