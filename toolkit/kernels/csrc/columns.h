// Multiplying column by column, for CPUs without an instruction that expands masked words.
//
// A reader turns a block into 32 columns of 16 rows, as floats; codes of integers are exact in
// them, and so are the sums of a group. A Reader<values, mask> has
//   block(at, visit): calls visit(column, Lanes) for each column; returns where the block ends
//   kScale: what its floats must be multiplied with
#pragma once

#include "gate.h"
#include "isa.h"

namespace {

// Sixteen rows, in registers of the baseline: g++ keeps vectors that are wider in memory.
#if defined(__AVX__)
constexpr int kParts = 2;
#else
constexpr int kParts = 4;
#endif
constexpr int kPart = 16 / kParts;
typedef float Part __attribute__((vector_size(4 * kPart), aligned(4 * kPart)));
struct Lanes {
  Part part[kParts];
};
GBLM_INLINE Lanes operator*(const Lanes& a, float b) {
  Lanes c;
  for (int i = 0; i < kParts; i++) c.part[i] = a.part[i] * b;
  return c;
}
GBLM_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
  Lanes c;
  for (int i = 0; i < kParts; i++) c.part[i] = a.part[i] * b.part[i];
  return c;
}
GBLM_INLINE void operator+=(Lanes& a, const Lanes& b) {
  for (int i = 0; i < kParts; i++) a.part[i] += b.part[i];
}
// Rounded once, so that every instruction set gives the same bits.
GBLM_INLINE void add_product(Lanes& sum, const Lanes& a, const Lanes& b) {
  for (int i = 0; i < kParts; i++)
#if defined(__FMA__) || defined(__aarch64__)
    sum.part[i] += a.part[i] * b.part[i];
#else
    for (int j = 0; j < kPart; j++)
      sum.part[i][j] = __builtin_fmaf(a.part[i][j], b.part[i][j], sum.part[i][j]);
#endif
}

constexpr int64_t kTogether = 4;  // tokens that share what is read

// A stored value; of int4 the nibble behind so many bits.
template <int Values>
GBLM_INLINE float read_value(const uint8_t* at, int shift) {
  if (Values == GBLM_BF16) return from_bf16(load<uint16_t>(at));
  if (Values == GBLM_INT8) return static_cast<float>(*at - 128);
  return static_cast<float>((*at >> shift & 15) - 8);
}

// Blocks of planes, on every CPU.
template <int Values, int Mask>
struct PlaneReader {
  static constexpr float kScale = 1;

  template <class Visit>
  static const uint8_t* block(const uint8_t* at, Visit&& visit) {
    alignas(64) float columns[kColumns][kRows] = {};
    const uint8_t* planes = at + kMaskBytes;
    for (int row = 0; row < kRows; row++)
      for (int byte = 0; byte < 4; byte++) {
        int k = 0;
        for (unsigned bits = at[4 * row + byte]; bits != 0 && k < 5; bits &= bits - 1, k++) {
          const Place place = find_place(Values, row, byte, k);
          columns[8 * byte + __builtin_ctz(bits)][row] =
              read_value<Values>(planes + place.offset, place.shift);
        }
      }
    for (int column = 0; column < kColumns; column++) visit(column, load<Lanes>(columns[column]));
    return at + block_size(Values, Mask);
  }
};

inline float widen(uint16_t x) { return from_bf16(x); }
inline float widen(float x) { return x; }

// The sums of a panel, for so many tokens.
inline void store_panel(const Panels& p, int64_t panel, int64_t tokens, const Lanes* sums,
                        Output y) {
  const int64_t rows = smaller(kRows, p.rows - panel * kRows);
  for (int64_t t = 0; t < tokens; t++) {
    float sum[kRows];
    std::memcpy(sum, sums + t, sizeof sum);
    const Output to = y.from(t, p);
    for (int64_t r = 0; r < rows; r++)
      if (to.wide != nullptr)
        to.wide[panel * kRows + r] = sum[r];
      else
        to.rounded[panel * kRows + r] = to_bf16(sum[r]);
  }
}

template <template <int, int> class Reader>
struct Columns {
  static int64_t padded(const Panels& p) { return p.blocks * kColumns; }
  static int64_t panels_per_task(const Panels&, int64_t, int64_t) { return 4; }
  static int64_t packed_bytes(const Panels& p, int64_t tokens) {
    return round_up(tokens, kTogether) * padded(p) * 4;
  }
  // Sums of all tokens, and one expanded block.
  static int64_t scratch_bytes(const Panels&, int64_t tokens) {
    return (2 * round_up(tokens, kTogether) + kColumns) * static_cast<int64_t>(sizeof(Lanes));
  }
  static int64_t width(const Panels&, int64_t) { return kTogether; }

  // Tiles of [columns][4 tokens]; integers as the codes -127 .. 127.
  template <class X>
  static void pack(const Panels& p, const void* rows, int64_t tokens, int64_t tile, void* packed,
                   Rounding* rounding) {
    const X* x = static_cast<const X*>(rows);
    float* to = static_cast<float*>(packed) + tile * kTogether * padded(p);
    const int64_t groups = p.group ? p.columns / p.group : 0;
    std::memset(to, 0, static_cast<size_t>(kTogether * padded(p)) * 4);
    for (int64_t t = 0; t < kTogether; t++) {
      const int64_t token = tile * kTogether + t;
      const X* row = x + (smaller(token, tokens - 1) - tile * kTogether) * p.columns;
      for (int64_t k = 0; k < p.columns; k++) to[k * kTogether + t] = widen(row[k]);
      for (int64_t g = 0; g < groups; g++)
        rounding[token * groups + g] = {quantise(to + g * p.group * kTogether + t, p.group), 0};
    }
  }

  static float quantise(float* x, int64_t count) {
    float most = 0;
    for (int64_t k = 0; k < count; k++) {
      const float size = __builtin_fabsf(x[k * kTogether]);
      most = size > most || size != size ? size : most;  // NaN wins
    }
    const float inverse = most > kLeast ? 127 / most : 0;
    for (int64_t k = 0; k < count; k++)
      x[k * kTogether] = __builtin_nearbyintf(x[k * kTogether] * inverse);
    return most / 127;
  }

  template <int Values, int Mask>
  static bool multiply_with(const Panels& p, const Activations& x, int64_t first, int64_t last,
                            Output y, void* scratch) {
    using Read = Reader<Values, Mask>;
    const int64_t tiles = (x.tokens + kTogether - 1) / kTogether;
    Lanes* sums = static_cast<Lanes*>(scratch);
    for (int64_t panel = first; panel < last; panel++) {
      std::memset(sums, 0, static_cast<size_t>(2 * tiles * kTogether) * sizeof(Lanes));
      const uint8_t* at = tiles == 1 ? few<Read>(p, p.begin(panel), x, sums)
                                     : many<Read>(p, p.begin(panel), x, tiles, sums);
      if (at == nullptr || !p.ends(panel, at)) return false;
      store_panel(p, panel, x.tokens, sums, y);
    }
    return true;
  }

  // Up to four tokens: a column is used as soon as it is there.
  template <class Read>
  static const uint8_t* few(const Panels& p, const uint8_t* at, const Activations& x, Lanes* sums) {
    return x.tokens == 1 ? few_tokens<Read, 1>(p, at, x, sums)
                         : few_tokens<Read, kTogether>(p, at, x, sums);
  }

  template <class Read, int64_t T>
  static const uint8_t* few_tokens(const Panels& p, const uint8_t* at, const Activations& x,
                                   Lanes* sums) {
    const float* packed = static_cast<const float*>(x.packed);
    const uint8_t* line = nullptr;
    const int64_t step = p.group ? p.group / kColumns : p.blocks;
    for (int64_t block = 0; block < p.blocks; block += step) {
      if (p.group && !p.open_group(block / step, &at, &line)) return nullptr;
      // Two sums a token: a chain of additions is shorter than the wait for the next weights.
      Lanes even[T] = {}, odd[T] = {};
      for (int64_t b = 0; b < step; b++, packed += kColumns * kTogether) {
        if (at > p.limit) return nullptr;
        at = Read::block(at, [&](int column, const Lanes& lanes) __attribute__((always_inline)) {
          for (int64_t t = 0; t < T; t++)
            (column % 2 ? odd : even)[t] += lanes * packed[column * kTogether + t];
        });
      }
      for (int64_t t = 0; t < T; t++) even[t] += odd[t];
      for (int64_t t = 0; t < T; t++) add<Read>(p, line, x, t, block / step, even[t], sums);
    }
    return at;
  }

  // More tokens: a block is expanded once and used by all of them.
  template <class Read>
  static const uint8_t* many(const Panels& p, const uint8_t* at, const Activations& x,
                             int64_t tiles, Lanes* sums) {
    Lanes* const partial = sums + tiles * kTogether;
    Lanes* const expanded = partial + tiles * kTogether;
    const uint8_t* line = nullptr;
    const int64_t step = p.group ? p.group / kColumns : p.blocks;
    for (int64_t block = 0; block < p.blocks; block += step) {
      if (p.group && !p.open_group(block / step, &at, &line)) return nullptr;
      for (int64_t b = block; b < block + step; b++) {
        if (at > p.limit) return nullptr;
        at = Read::block(at, [&](int column, const Lanes& lanes)
                                 __attribute__((always_inline)) { expanded[column] = lanes; });
        for (int64_t tile = 0; tile < tiles; tile++)
          multiply_block(
              expanded,
              static_cast<const float*>(x.packed) + (tile * padded(p) + b * kColumns) * kTogether,
              partial + tile * kTogether);
      }
      for (int64_t t = 0; t < tiles * kTogether; t++) {
        add<Read>(p, line, x, t, block / step, partial[t], sums);
        partial[t] = Lanes{};
      }
    }
    return at;
  }

  static void multiply_block(const Lanes* columns, const float* x, Lanes* sums) {
    Lanes a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    for (int64_t k = 0; k < kColumns; k++, x += kTogether) {
      a += columns[k] * x[0];
      b += columns[k] * x[1];
      c += columns[k] * x[2];
      d += columns[k] * x[3];
    }
    sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
  }

  // Add what one group has summed up.
  template <class Read>
  static void add(const Panels& p, const uint8_t* line, const Activations& x, int64_t token,
                  int64_t group, const Lanes& sum, Lanes* sums) {
    if (p.group == 0) {
      sums[token] += sum;
      return;
    }
    const float scale = x.groups[token * (p.columns / p.group) + group].scale * Read::kScale;
    alignas(64) float weights[kRows];
    for (int r = 0; r < kRows; r++) weights[r] = from_bf16(load<uint16_t>(line + 2 * r));
    add_product(sums[token], sum, load<Lanes>(weights) * scale);
  }

  static bool multiply(const Panels& p, const Activations& x, int64_t first, int64_t last, Output y,
                       void* scratch) {
    using Multiply = decltype(&multiply_with<0, 0>);
    static constexpr Multiply table[3][4] = {
        {multiply_with<0, 0>, multiply_with<0, 1>, multiply_with<0, 2>, multiply_with<0, 3>},
        {multiply_with<1, 0>, multiply_with<1, 1>, multiply_with<1, 2>, multiply_with<1, 3>},
        {multiply_with<2, 0>, multiply_with<2, 1>, multiply_with<2, 2>, multiply_with<2, 3>}};
    return table[p.values][p.mask](p, x, first, last, y, scratch);
  }

  // Of activations of type X.
  template <class X>
  static constexpr Isa isa(const char* name, bool (*supported)(), const Isa* wide) {
    return {name,  supported, panels_per_task, packed_bytes, scratch_bytes,
            width, pack<X>,   multiply,        gate_token,   wide};
  }
};

}  // namespace
