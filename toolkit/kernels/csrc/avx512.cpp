// AVX-512 with BF16, VNNI, VBMI, VBMI2 and BITALG (Zen 4, Sapphire Rapids and later).
//
// Up to 16 tokens: each word is expanded into a register and multiplied at once, so weights are
// read once and never written. More tokens: two panels are expanded into cache, 1024 columns at a
// time, and multiplied from there; or zeros are skipped, where few weights are kept.
#include "avx512_planes.h"
#include "avx512_skip.h"
#include "avx512_tiles.h"
#include "gate.h"

namespace {

// Tokens that are packed together.
int64_t pack_width(const Panels& p, int64_t tokens) {
  return skips_zeros(p, tokens) ? kSkipWidth : tile_width(tokens);
}
// Few tokens: long pieces, for what is asked ahead at the end of one belongs to another thread.
int64_t panels_per_task(const Panels& p, int64_t tokens, int64_t threads) {
  const int64_t half = (p.count + 2 * threads - 1) / (2 * threads);
  return tokens <= kMaxDecode ? larger(kSkipPanels, half) : kSkipPanels;
}
int64_t packed_bytes(const Panels& p, int64_t tokens) {
  const int64_t padded = round_up(tokens, pack_width(p, tokens));
  return padded * p.blocks * kColumns * (p.values == GBLM_BF16 ? 2 : 1);
}
int64_t wide_scratch_bytes(const Panels&, int64_t tokens) {
  return 2 * kCacheBytes + tokens * 2 * kRows * static_cast<int64_t>(sizeof(float));
}
int64_t scratch_bytes(const Panels& p, int64_t tokens) {
  return skips_zeros(p, tokens) ? Skip::bytes(tokens) : wide_scratch_bytes(p, tokens);
}

void pack(const Panels& p, const void* rows, int64_t tokens, int64_t tile, void* packed,
          Rounding* groups) {
  const uint16_t* x = static_cast<const uint16_t*>(rows);
  const int64_t width = pack_width(p, tokens), first = tile * width;
  const int64_t here = smaller(width, tokens - first);
  const int64_t padded = tokens <= kMaxDecode     ? width
                         : skips_zeros(p, tokens) ? round_up(here, 16)
                                                  : here;
  uint32_t* to = static_cast<uint32_t*>(packed);
  if (p.values == GBLM_BF16) {
    to += first * p.blocks * kColumns / 2;
    has_planes(p.mask) ? pack_plane_floats<Halves>(p, x, here, padded, to)
                       : pack_floats(p, x, here, padded, to);
    return;
  }
  to += first * p.blocks * kColumns / 4;
  groups += first * (p.columns / p.group);
  if (has_planes(p.mask))
    pack_plane_integers(p, x, here, padded, tokens == 1, reinterpret_cast<uint8_t*>(to), groups);
  else
    pack_integers(p, x, here, padded, to, groups);
}

template <class Reader, class Dot>
bool multiply_with(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                   void* scratch) {
  if (x.tokens > kMaxDecode) return pairs<Reader, Dot>(p, x, first, last, y, scratch);
  switch (tile_width(x.tokens)) {
    case 1:
      return kOnZen4 ? decode<Reader, Dot, 1, false>(p, x, first, last, y)
                     : decode<Reader, Dot, 1>(p, x, first, last, y);
    case 2:
      return decode<Reader, Dot, 2>(p, x, first, last, y);
    case 3:
      return decode<Reader, Dot, 3>(p, x, first, last, y);
    case 4:
      return decode<Reader, Dot, 4>(p, x, first, last, y);
    case 6:
      return decode<Reader, Dot, 6>(p, x, first, last, y);
    case 8:
      return decode<Reader, Dot, 8>(p, x, first, last, y);
    case 12:
      return decode<Reader, Dot, 12>(p, x, first, last, y);
    default:
      return decode<Reader, Dot, 16>(p, x, first, last, y);
  }
}

template <class Dot, class Steps>
bool multiply_floats(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                     void* scratch) {
  switch (p.mask) {
    case GBLM_DENSE:
      return multiply_with<Bf16<GBLM_DENSE>, Dot>(p, x, first, last, y, scratch);
    case GBLM_ANY:
      return multiply_with<Bf16<GBLM_ANY>, Dot>(p, x, first, last, y, scratch);
    case GBLM_4_OF_8:
      return multiply_planes<Steps, GBLM_4_OF_8>(p, x, first, last, y, scratch);
    default:
      return multiply_planes<Steps, GBLM_8_OF_16>(p, x, first, last, y, scratch);
  }
}

template <template <int> class Reader, int Values>
bool multiply_codes(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                    void* scratch) {
  switch (p.mask) {
    case GBLM_DENSE:
      return multiply_with<Reader<GBLM_DENSE>, PairDot>(p, x, first, last, y, scratch);
    case GBLM_ANY:
      return multiply_with<Reader<GBLM_ANY>, PairDot>(p, x, first, last, y, scratch);
    case GBLM_4_OF_8:
      return multiply_planes<Codes<Values>, GBLM_4_OF_8>(p, x, first, last, y, scratch);
    default:
      return multiply_planes<Codes<Values>, GBLM_8_OF_16>(p, x, first, last, y, scratch);
  }
}

bool multiply(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
              void* scratch) {
  if (skips_zeros(p, x.tokens)) return multiply_skipping(p, x, first, last, y, scratch);
  switch (p.values) {
    case GBLM_INT8:
      return multiply_codes<Int8, GBLM_INT8>(p, x, first, last, y, scratch);
    case GBLM_INT4:
      return multiply_codes<Int4, GBLM_INT4>(p, x, first, last, y, scratch);
    default:
      return multiply_floats<PairDot, Halves>(p, x, first, last, y, scratch);
  }
}

// float32 activations do not skip zeros: the lists hold pairs of bf16.
int64_t wide_packed_bytes(const Panels& p, int64_t tokens) {
  return round_up(tokens, tile_width(tokens)) * p.blocks * kColumns * 4;
}
int64_t wide_width(const Panels&, int64_t tokens) { return tile_width(tokens); }
void pack_wide(const Panels& p, const void* rows, int64_t tokens, int64_t tile, void* packed,
               Rounding*) {
  const int64_t width = tile_width(tokens), first = tile * width;
  const int64_t here = smaller(width, tokens - first);
  const float* x = static_cast<const float*>(rows);
  float* to = static_cast<float*>(packed) + first * p.blocks * kColumns;
  const int64_t padded = tokens <= kMaxDecode ? width : here;
  has_planes(p.mask) ? pack_plane_floats<Floats>(p, x, here, padded, to)
                     : pack_wide_floats(p, x, here, padded, to);
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
}

const Isa kAvx512Wide = {
    "avx512",           supported,  panels_per_task, wide_packed_bytes,
    wide_scratch_bytes, wide_width, pack_wide,       multiply_floats<WideDot, Floats>,
    gate_token,         nullptr};

}  // namespace

const Isa kAvx512 = {"avx512",   supported, panels_per_task, packed_bytes, scratch_bytes,
                     pack_width, pack,      multiply,        gate_token,   &kAvx512Wide};
