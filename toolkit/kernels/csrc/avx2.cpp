// AVX2 and FMA: a byte of mask picks the shuffle that puts eight kept values in their places; for
// N:M weights and dense integers, see avx2_planes.h.
#include <type_traits>

#include "avx2_planes.h"

namespace {

// For each mask byte: where each of eight places takes its value from; 0x80 makes a zero.
struct Shuffles {
  alignas(16) uint8_t words[256][16];
  alignas(8) uint8_t bytes[256][8];
  uint8_t count[256];

  constexpr Shuffles() : words(), bytes(), count() {
    for (int mask = 0; mask < 256; mask++) {
      uint8_t kept = 0;
      for (int i = 0; i < 8; i++) {
        const bool set = mask >> i & 1;
        words[mask][2 * i] = set ? static_cast<uint8_t>(2 * kept) : 0x80;
        words[mask][2 * i + 1] = set ? static_cast<uint8_t>(2 * kept + 1) : 0x80;
        bytes[mask][i] = set ? kept : 0x80;
        kept += set;
      }
      count[mask] = kept;
    }
  }
};
constexpr Shuffles kShuffles;

inline Lanes join(__m256 low, __m256 high) { return {{(Part)low, (Part)high}}; }

template <int Lines>
inline void prefetch(const uint8_t* at) {
  for (int i = 0; i < Lines; i++)
    _mm_prefetch(reinterpret_cast<const char*>(at) + 4096 + kLine * i, _MM_HINT_T0);
}

// A word of 8 rows x 2 columns of bf16 as its two columns.
template <class Visit>
inline __attribute__((always_inline)) void visit_pair(int column, __m256i rows0, __m256i rows8,
                                                      Visit&& visit) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
  visit(column, join(_mm256_castsi256_ps(_mm256_slli_epi32(rows0, 16)),
                     _mm256_castsi256_ps(_mm256_slli_epi32(rows8, 16))));
  visit(column + 1, join(_mm256_castsi256_ps(_mm256_and_si256(rows0, high)),
                         _mm256_castsi256_ps(_mm256_and_si256(rows8, high))));
}

// A word of 8 rows x 4 columns of signed bytes as its four columns.
template <class Visit>
inline __attribute__((always_inline)) void visit_quad(int column, __m256i rows0, __m256i rows8,
                                                      Visit&& visit) {
  const auto pick = [](__m256i rows, int byte) {
    const __m256i top = _mm256_slli_epi32(rows, 24 - 8 * byte);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
  };
  for (int byte = 0; byte < 4; byte++)
    visit(column + byte, join(pick(rows0, byte), pick(rows8, byte)));
}

template <int Values, int Mask>
struct Avx2Reader;

template <int Mask>
struct Avx2Reader<GBLM_BF16, Mask> {
  static constexpr float kScale = 1;

  // Eight rows of a word. Where they begin follows from the mask alone: no chain of additions.
  template <int Byte>
  static __m128i expand(const uint8_t* word, uint32_t mask) {
    const uint32_t before = Byte == 0 ? 0 : mask & ((1u << 8 * Byte) - 1);
    const __m128i order = _mm_load_si128((const __m128i*)kShuffles.words[mask >> 8 * Byte & 255]);
    return _mm_shuffle_epi8(load128(word + 2 * _mm_popcnt_u32(before)), order);
  }

  template <class Visit>
  static inline __attribute__((always_inline)) const uint8_t* block(const uint8_t* at,
                                                                    Visit&& visit) {
    prefetch<Mask == GBLM_DENSE ? 16 : 9>(at);
    const uint8_t* v = Mask == GBLM_DENSE ? at : at + kMaskBytes;
    for (int word = 0; word < 16; word++) {
      __m256i rows0, rows8;
      if (Mask == GBLM_DENSE) {
        rows0 = load256(v), rows8 = load256(v + 32);
        v += kLine;
      } else {
        const uint32_t mask = load<uint32_t>(at + 4 * word);
        rows0 = _mm256_set_m128i(expand<1>(v, mask), expand<0>(v, mask));
        rows8 = _mm256_set_m128i(expand<3>(v, mask), expand<2>(v, mask));
        v += 2 * _mm_popcnt_u32(mask);
      }
      visit_pair(2 * word, rows0, rows8, visit);
    }
    return v;
  }
};

// Eight rows x four columns of codes + 128 under 32 bits of mask become signed. They stay in
// registers: loading wide what was just stored in pieces would wait for the stores.
inline __m256i expand_bytes(const uint8_t* masks, const uint8_t*& from) {
  const __m128i sign = _mm_set1_epi8(static_cast<char>(0x80));
  __m128i part[4];
  for (int i = 0; i < 4; i++) {
    const __m128i order = _mm_loadl_epi64((const __m128i*)kShuffles.bytes[masks[i]]);
    part[i] = _mm_shuffle_epi8(_mm_xor_si128(_mm_loadl_epi64((const __m128i*)from), sign), order);
    from += kShuffles.count[masks[i]];
  }
  return _mm256_set_m128i(_mm_unpacklo_epi64(part[2], part[3]),
                          _mm_unpacklo_epi64(part[0], part[1]));
}

template <int Mask>
struct Avx2Reader<GBLM_INT8, Mask> {
  static constexpr float kScale = 1;

  template <class Visit>
  static inline __attribute__((always_inline)) const uint8_t* block(const uint8_t* at,
                                                                    Visit&& visit) {
    prefetch<5>(at);
    const uint8_t* v = at + kMaskBytes;
    for (int word = 0; word < 8; word++) {
      const __m256i rows0 = expand_bytes(at + 8 * word, v);
      visit_quad(4 * word, rows0, expand_bytes(at + 8 * word + 4, v), visit);
    }
    return v;
  }
};

// Nibbles, codes + 8, are read as bytes of 16 times their code, + 128.
template <int Mask>
struct Avx2Reader<GBLM_INT4, Mask> {
  static constexpr float kScale = 1.0f / 16;

  template <class Visit>
  static inline __attribute__((always_inline)) const uint8_t* block(const uint8_t* at,
                                                                    Visit&& visit) {
    prefetch<3>(at);
    const uint8_t* v = at + kMaskBytes;
    const __m256i high = _mm256_set1_epi8(static_cast<char>(0xF0));
    for (int word = 0; word < 8; word += 2) {
      alignas(32) uint8_t runs[2][64 + 8];  // a shuffle may look 8 bytes ahead
      for (int half = 0; half < 2; half++) {
        const __m256i both = load256(v + 32 * half);
        const __m256i low = _mm256_and_si256(_mm256_slli_epi16(both, 4), high);
        _mm256_storeu_si256((__m256i*)(runs[0] + 32 * half), low);
        _mm256_storeu_si256((__m256i*)(runs[1] + 32 * half), _mm256_and_si256(both, high));
      }
      int longest = 0;
      for (int i = 0; i < 2; i++) {
        const uint8_t* from = runs[i];
        const uint8_t* masks = at + 8 * (word + i);
        const __m256i rows0 = expand_bytes(masks, from);
        visit_quad(4 * (word + i), rows0, expand_bytes(masks + 4, from), visit);
        longest = larger(longest, static_cast<int>(from - runs[i]));
      }
      v += longest;
    }
    return v;
  }
};

// Whether kernels of steps multiply: N:M weights, and dense integers.
constexpr bool has_steps(int32_t values, int32_t mask) {
  return has_planes(mask) || (is_integer(values) && mask == GBLM_DENSE);
}
// Those never come through a reader.
template <int Values, int Mask>
using Reader = Avx2Reader<Values, has_steps(Values, Mask) ? GBLM_ANY : Mask>;
using Engine = Columns<Reader>;

int64_t scratch_bytes(const Panels& p, int64_t tokens) {
  return has_steps(p.values, p.mask) ? step_scratch_bytes(tokens)
                                     : Engine::scratch_bytes(p, tokens);
}

// Both ways have tiles of four tokens, and floats for activations at most.
template <class X>
void pack(const Panels& p, const void* rows, int64_t tokens, int64_t tile, void* packed,
          Rounding* groups) {
  const auto with = has_steps(p.values, p.mask) ? pack_for_steps<X> : Engine::pack<X>;
  with(p, rows, tokens, tile, packed, groups);
}

template <int Values>
bool multiply_values(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                     void* scratch) {
  switch (p.mask) {
    case GBLM_4_OF_8:
      return multiply_steps<Values, GBLM_4_OF_8>(p, x, first, last, y, scratch);
    case GBLM_8_OF_16:
      return multiply_steps<Values, GBLM_8_OF_16>(p, x, first, last, y, scratch);
    default:
      if constexpr (is_integer(Values))
        if (p.mask == GBLM_DENSE)
          return multiply_steps<Values, GBLM_DENSE>(p, x, first, last, y, scratch);
      return Engine::multiply(p, x, first, last, y, scratch);
  }
}
bool multiply(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
              void* scratch) {
  const auto with = p.values == GBLM_INT4   ? multiply_values<GBLM_INT4>
                    : p.values == GBLM_INT8 ? multiply_values<GBLM_INT8>
                                            : multiply_values<GBLM_BF16>;
  return with(p, x, first, last, y, scratch);
}

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

template <class X>
constexpr Isa isa(const Isa* wide) {
  return {"avx2",
          supported,
          Engine::panels_per_task,
          Engine::packed_bytes,
          scratch_bytes,
          Engine::width,
          pack<X>,
          multiply,
          gate_token,
          wide};
}
constexpr Isa kAvx2Wide = isa<float>(nullptr);

}  // namespace

const Isa kAvx2 = isa<uint16_t>(&kAvx2Wide);
