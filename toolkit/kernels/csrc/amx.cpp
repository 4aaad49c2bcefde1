// AMX (Sapphire Rapids and later): tiles of 16 tokens x 16 rows.
//
// Weights are expanded into cache and multiplied from there; for one token, too, that is as fast as
// expanding in registers, or faster.
#include "amx_cache.h"
#include "amx_decode.h"
#include "amx_planes.h"
#include "avx512_round.h"
#include "gate.h"

namespace {

// Few tokens: picking their activations is less work than expanding weights into tiles.
bool picks(const Panels& p, int64_t tokens) { return has_planes(p.mask) && tokens <= kTileRows; }

int64_t panels_per_task(const Panels& p, int64_t tokens, int64_t threads) {
  if (picks(p, tokens)) return kAvx512.panels_per_task(p, tokens, threads);
  if (TokenTiles(p, tokens).count <= kDecodeTiles) return 8;
  return smaller(kTogether, round_up((p.count + threads - 1) / threads, 2));
}
int64_t packed_bytes(const Panels& p, int64_t tokens) {
  if (picks(p, tokens)) return kAvx512.packed_bytes(p, tokens);
  const TokenTiles tiles(p, tokens);
  return tiles.count * tiles.tile_bytes();
}
int64_t scratch_bytes(const Panels& p, int64_t tokens) {
  if (picks(p, tokens)) return kAvx512.scratch_bytes(p, tokens);
  const TokenTiles tiles(p, tokens);
  return tiles.count <= kDecodeTiles ? kDecodeBytes
                                     : Multiplier<Bf16<GBLM_ANY>>::scratch_bytes(tiles);
}
int64_t width(const Panels& p, int64_t tokens) {
  return picks(p, tokens) ? kAvx512.width(p, tokens) : TokenTiles(p, tokens).width;
}

void pack_floats(const Panels& p, const uint16_t* x, int64_t tokens, const TokenTiles& tiles,
                 uint8_t* to) {
  for (int64_t s = 0; s < tiles.steps; s++)
    for (int64_t t = 0; t < tiles.width; t++, to += kLine) {
      const int64_t left = t < tokens ? smaller(kColumns, p.columns - s * kColumns) : 0;
      const __mmask32 some = static_cast<__mmask32>((uint64_t{1} << left) - 1);
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(some, x + t * p.columns + s * kColumns));
    }
}

void pack_integers(const Panels& p, const uint16_t* x, int64_t tokens, const TokenTiles& tiles,
                   uint8_t* to, Rounding* rounding) {
  const int64_t groups = p.columns / p.group, steps = TokenTiles::group_steps(p);
  for (int64_t t = 0; t < tiles.width; t++) {
    const uint16_t* row = x + smaller(t, tokens - 1) * p.columns;
    for (int64_t g = 0; g < groups; g++, row += p.group) {
      const float most = largest(row, p.group);
      const __m512 inverse = inverse_scale(most);
      __m128i sum = _mm_setzero_si128();
      uint8_t* line = to + g * steps * tiles.step_bytes() + t * kLine;
      for (int64_t k = 0; k < steps * 64; k += 16) {
        const __m128i codes =
            k < p.group ? _mm512_cvtepi32_epi8(round_codes(row + k, inverse)) : _mm_setzero_si128();
        _mm_storeu_si128((__m128i*)(line + k / 64 * tiles.step_bytes() + k % 64), codes);
        sum = _mm_dpbusd_epi32(sum, _mm_set1_epi8(1), codes);
      }
      rounding[g * tiles.width + t] = {most / 127, 128 * add_lanes(sum)};
    }
  }
}

void pack(const Panels& p, const void* rows, int64_t tokens, int64_t tile, void* packed,
          Rounding* groups) {
  if (picks(p, tokens)) return kAvx512.pack(p, rows, tokens, tile, packed, groups);
  const uint16_t* x = static_cast<const uint16_t*>(rows);
  const TokenTiles tiles(p, tokens);
  const int64_t first = tile * tiles.width, here = smaller(tiles.width, tokens - first);
  uint8_t* to = static_cast<uint8_t*>(packed) + tile * tiles.tile_bytes();
  if (p.values == GBLM_BF16)
    pack_floats(p, x, here, tiles, to);
  else
    pack_integers(p, x, here, tiles, to, groups + first * (p.columns / p.group));
}

template <class Reader>
bool multiply_with(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                   void* scratch) {
  const TokenTiles tokens(p, x.tokens);
  const TileRegisters registers(tokens.width);
  switch (tokens.count) {
    case 1:
      return Decoder<Reader, 1>(p, x, tokens, scratch).run(first, last, y);
    case kDecodeTiles:
      return Decoder<Reader, 2>(p, x, tokens, scratch).run(first, last, y);
    default:
      return Multiplier<Reader>(p, x, tokens, scratch).run(first, last, y);
  }
}

template <template <int> class Reader, template <int> class Planes>
bool multiply_mask(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                   void* scratch) {
  switch (p.mask) {
    case GBLM_DENSE:
      return multiply_with<Reader<GBLM_DENSE>>(p, x, first, last, y, scratch);
    case GBLM_ANY:
      return multiply_with<Reader<GBLM_ANY>>(p, x, first, last, y, scratch);
    case GBLM_4_OF_8:
      return multiply_with<Planes<GBLM_4_OF_8>>(p, x, first, last, y, scratch);
    default:
      return multiply_with<Planes<GBLM_8_OF_16>>(p, x, first, last, y, scratch);
  }
}

template <int Mask>
using PlaneInt8 = PlaneCodes<GBLM_INT8, Mask>;
template <int Mask>
using PlaneInt4 = PlaneCodes<GBLM_INT4, Mask>;

bool multiply(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
              void* scratch) {
  if (picks(p, x.tokens)) return kAvx512.multiply(p, x, first, last, y, scratch);
  switch (p.values) {
    case GBLM_BF16:
      return multiply_mask<Bf16, PlaneHalves>(p, x, first, last, y, scratch);
    case GBLM_INT8:
      return multiply_mask<Int8, PlaneInt8>(p, x, first, last, y, scratch);
    default:
      return multiply_mask<Int4, PlaneInt4>(p, x, first, last, y, scratch);
  }
}

bool supported() {
  static const bool found = kAvx512.supported() && has_tiles() && may_use_tiles();
  return found;
}

}  // namespace

const Isa kAmx = {"amx", supported, panels_per_task, packed_bytes, scratch_bytes,
                  width, pack,      multiply,        gate_token,   nullptr};
