// AMX (Sapphire Rapids and later): tiles of 16 tokens x 16 rows.
//
// Two panels are expanded into cache, some columns at a time, and multiplied from there. For the
// fewest tokens, expanding in registers is as fast: those are left to AVX-512.
#include <cpuid.h>

#include "amx_decode.h"
#include "avx512_round.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kCacheBytes = 16384;      // of one expanded panel: two leave room in 48 KB
constexpr int64_t kTogether = 16;           // panels that share some columns of the activations
constexpr int64_t kCachedTokens = 1 << 20;  // bytes of activations that stay in cache

// Fewer tokens are left to AVX-512, by value type.
constexpr int64_t kFewest[] = {1, 1, 1};
bool uses_tiles(const Panels& p, int64_t tokens) { return tokens >= kFewest[p.values]; }

int64_t packed_bytes(const Panels& p, int64_t tokens) {
  if (!uses_tiles(p, tokens)) return kAvx512.packed_bytes(p, tokens);
  const TokenTiles tiles(p, tokens);
  return tiles.count * tiles.tile_bytes();
}
int64_t scratch_bytes(const Panels& p, int64_t tokens) {
  if (!uses_tiles(p, tokens)) return kAvx512.scratch_bytes(p, tokens);
  // A tile of weights may reach half a tile further than they do.
  return 2 * kCacheBytes + kTile + kTogether / 2 * TokenTiles(p, tokens).padded() * kSumStride;
}
int64_t tiles(const Panels& p, int64_t tokens) {
  return uses_tiles(p, tokens) ? TokenTiles(p, tokens).count : kAvx512.tiles(p, tokens);
}

void pack_floats(const Panels& p, const uint16_t* x, int64_t tokens, const TokenTiles& tiles,
                 uint8_t* to) {
  for (int64_t t = 0; t < tiles.width; t++, x += p.columns, to += kLine) {
    for (int64_t s = 0; s < tiles.steps; s++) {
      const int64_t left = t < tokens ? smaller(kColumns, p.columns - s * kColumns) : 0;
      const __mmask32 some = static_cast<__mmask32>((uint64_t{1} << left) - 1);
      const __m512i line = _mm512_maskz_loadu_epi16(some, x + s * kColumns);
      _mm512_storeu_si512(to + s * tiles.step_bytes(), line);
    }
  }
}

void pack_integers(const Panels& p, const uint16_t* x, int64_t tokens, const TokenTiles& tiles,
                   uint8_t* to, float* scales) {
  const int64_t groups = p.columns / p.group, steps = TokenTiles::group_steps(p);
  for (int64_t t = 0; t < tiles.width; t++) {
    const uint16_t* row = x + smaller(t, tokens - 1) * p.columns;
    for (int64_t g = 0; g < groups; g++, row += p.group) {
      const float most = largest(row, p.group);
      const __m512 inverse = inverse_scale(most);
      scales[g * tiles.width + t] = most / 127;
      uint8_t* line = to + g * steps * tiles.step_bytes() + t * kLine;
      for (int64_t k = 0; k < steps * 64; k += 16) {
        const __m128i codes =
            k < p.group ? _mm512_cvtepi32_epi8(round_codes(row + k, inverse)) : _mm_setzero_si128();
        _mm_storeu_si128((__m128i*)(line + k / 64 * tiles.step_bytes() + k % 64), codes);
      }
    }
  }
}

void pack(const Panels& p, const uint16_t* x, int64_t tokens, int64_t tile, void* packed,
          float* scales) {
  if (!uses_tiles(p, tokens)) return kAvx512.pack(p, x, tokens, tile, packed, scales);
  const TokenTiles tiles(p, tokens);
  const int64_t first = tile * tiles.width, here = smaller(tiles.width, tokens - first);
  uint8_t* to = static_cast<uint8_t*>(packed) + tile * tiles.tile_bytes();
  x += first * p.columns;
  if (p.values == GBLM_BF16)
    pack_floats(p, x, here, tiles, to);
  else
    pack_integers(p, x, here, tiles, to, scales + first * (p.columns / p.group));
}

// One task: its panels, all tokens.
template <class Reader>
class Task {
 public:
  Task(const Panels& panels, const Activations& activations, void* memory)
      : p(panels), x(activations), tokens(p, x.tokens), registers_(tokens.width) {
    cache_[0] = static_cast<uint8_t*>(memory);
    cache_[1] = cache_[0] + kCacheBytes;
    sums_ = reinterpret_cast<float*>(cache_[1] + kCacheBytes + kTile);
  }

  // False when the panels are damaged.
  bool run(int64_t first, int64_t last, uint16_t* y) {
    if (tokens.count == 1) return decode<1>(first, last, y);
    if (tokens.count == kDecodeTiles) return decode<2>(first, last, y);
    // Panels share some columns of the activations only if not all of them stay in cache.
    const bool fits = tokens.count * tokens.tile_bytes() <= kCachedTokens;
    const int64_t together = fits ? 2 : last - first;
    for (int64_t panel = first; panel < last; panel += together)
      if (!multiply(panel, smaller(panel + together, last), y)) return false;
    return true;
  }

 private:
  template <int T>
  bool decode(int64_t first, int64_t last, uint16_t* y) {
    Decoder<Reader, T> decoder(p, x, tokens, cache_[0], sums_);
    for (int64_t panel = first; panel < last; panel += 2) {
      if (!decoder.run(panel, last)) return false;
      store(panel, smaller(panel + 2, last), y);
    }
    return true;
  }

  bool multiply(int64_t first, int64_t last, uint16_t* y) {
    const int64_t pairs = (last - first + 1) / 2, size = tokens.padded() * 2 * kRows;
    std::memset(sums_, 0, static_cast<size_t>(pairs * size) * sizeof(float));
    const uint8_t* at[kTogether / 2][2];
    for (int64_t i = 0; i < 2 * pairs; i++)  // the last one twice if it is alone
      at[i / 2][i % 2] = p.begin(smaller(first + i, last - 1));
    const int64_t blocks =
        Reader::kWords == 16 ? 16 : 32 / (p.group / kColumns) * (p.group / kColumns);
    for (int64_t block = 0; block < p.blocks; block += blocks) {
      const int64_t count = smaller(blocks, p.blocks - block);
      for (int64_t i = 0; i < pairs; i++)
        if (!columns(block, count, at[i], sums_ + i * size)) return false;
    }
    for (int64_t panel = first; panel < last; panel++)
      if (!p.ends(panel, at[(panel - first) / 2][(panel - first) % 2])) return false;
    store(first, last, y);
    return true;
  }

  // Some blocks of two panels.
  bool columns(int64_t block, int64_t count, const uint8_t* (&at)[2], float* sums) {
    if constexpr (Reader::kWords == 16)
      return float_columns(block, count, at, sums);
    else
      return integer_columns(block, count, at, sums);
  }

  bool float_columns(int64_t block, int64_t count, const uint8_t* (&at)[2], float* sums) {
    const uint8_t* words[2];
    for (int i = 0; i < 2; i++) {
      const Words w = expand<Reader>(p, at[i], count, cache_[i]);
      words[i] = w.first;
      at[i] = w.next;
      if (at[i] == nullptr) return false;
    }
    const uint8_t* from = static_cast<const uint8_t*>(x.packed) + block * tokens.step_bytes();
    for (int64_t t = 0; t < tokens.count; t += 2) {
      const auto tile = t + 1 < tokens.count ? float_tile<2> : float_tile<1>;
      tile(words, count, from + t * tokens.tile_bytes(), tokens,
           sums + t * tokens.width * 2 * kRows);
    }
    return true;
  }

  bool integer_columns(int64_t block, int64_t count, const uint8_t* (&at)[2], float* sums) {
    const int64_t blocks = p.group / kColumns, g = block / blocks, all = p.blocks / blocks;
    Groups groups;
    groups.count = count / blocks;
    groups.steps = TokenTiles::group_steps(p);
    for (int i = 0; i < 2; i++) {
      for (int64_t j = 0; j < groups.count; j++) {
        if (at[i] > p.limit) return false;
        groups.lines[j][i] = at[i];
        const Words w = expand<Reader>(p, at[i] + kLine, blocks, cache_[i] + j * p.group * kRows);
        groups.words[j][i] = w.first;
        at[i] = w.next;
        if (at[i] == nullptr) return false;
      }
    }
    const uint8_t* from =
        static_cast<const uint8_t*>(x.packed) + g * groups.steps * tokens.step_bytes();
    for (int64_t t = 0; t < tokens.count; t += 2) {
      const auto tile =
          t + 1 < tokens.count ? integer_tile<Reader::kShift, 2> : integer_tile<Reader::kShift, 1>;
      tile(groups, from + t * tokens.tile_bytes(), tokens, x.scales + (t * all + g) * tokens.width,
           all * tokens.width, sums + t * tokens.width * 2 * kRows);
    }
    return true;
  }

  void store(int64_t first, int64_t last, uint16_t* y) const {
    for (int64_t t = 0; t < x.tokens; t++)
      for (int64_t i = 0; i < last - first; i++) {
        const float* sums = sums_ + (i / 2 * tokens.padded() + t) * 2 * kRows + i % 2 * kRows;
        store_rows(p, first + i, _mm512_loadu_ps(sums), y + t * p.rows);
      }
  }

  const Panels& p;
  const Activations& x;
  const TokenTiles tokens;
  const TileRegisters registers_;
  uint8_t* cache_[2];
  float* sums_;  // [pair of panels][tokens][2 * 16 rows]
};

template <template <int> class Reader>
bool multiply_with(const Panels& p, const Activations& x, int64_t first, int64_t last, uint16_t* y,
                   void* scratch) {
  switch (p.mask) {
    case GBLM_DENSE:
      return Task<Reader<GBLM_DENSE>>(p, x, scratch).run(first, last, y);
    case GBLM_ANY:
      return Task<Reader<GBLM_ANY>>(p, x, scratch).run(first, last, y);
    default:
      return Task<Reader<GBLM_2_OF_4>>(p, x, scratch).run(first, last, y);
  }
}

bool multiply(const Panels& p, const Activations& x, int64_t first, int64_t last, uint16_t* y,
              void* scratch) {
  if (!uses_tiles(p, x.tokens)) return kAvx512.multiply(p, x, first, last, y, scratch);
  switch (p.values) {
    case GBLM_BF16:
      return multiply_with<Bf16>(p, x, first, last, y, scratch);
    case GBLM_INT8:
      return multiply_with<Int8>(p, x, first, last, y, scratch);
    default:
      return multiply_with<Int4>(p, x, first, last, y, scratch);
  }
}

bool has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, osxsave = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & bf16) && (d & tile) && (d & int8);
}

// The system keeps tiles across threads, and lets this process have them.
bool may_use_tiles() {
#if defined(__linux__)
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tiles = 3u << 17;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (low & tiles) == tiles && syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

bool supported() {
  static const bool found = kAvx512.supported() && has_tiles() && may_use_tiles();
  return found;
}

}  // namespace

const Isa kAmx = {"amx", supported, kTogether, packed_bytes, scratch_bytes, tiles, pack, multiply};
