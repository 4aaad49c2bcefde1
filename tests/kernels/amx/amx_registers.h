// AMX's tile registers in plain C++, in the place of csrc/amx_registers.h: what Intel's manual
// (volume 2, TDPBF16PS, TDPBSUD, TILELOADD …) says the instructions do, on any CPU with AVX-512.
#pragma once

#include <type_traits>

#include "avx512_expand.h"

namespace {

constexpr int64_t kTile = 1024;    // bytes
constexpr int64_t kTileRows = 16;  // tokens

struct Tile {
  int64_t rows;
  uint8_t bytes[kTileRows][kLine];
};
thread_local Tile t_tiles[8];
thread_local bool t_set_up = false;

inline Tile& tile(int number) {
  if (!t_set_up) __builtin_trap();
  return t_tiles[number];
}

template <int T>
void load_tile(const void* from, int64_t stride) {
  Tile& to = tile(T);
  std::memset(to.bytes, 0, sizeof to.bytes);
  for (int64_t r = 0; r < to.rows; r++)
    std::memcpy(to.bytes[r], static_cast<const uint8_t*>(from) + r * stride, kLine);
}
template <int T>
void load_passing_tile(const void* from, int64_t stride) {
  load_tile<T>(from, stride);
}
template <int T>
void store_tile(void* to, int64_t stride) {
  for (int64_t r = 0; r < tile(T).rows; r++)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, tile(T).bytes[r], kLine);
}
template <int T>
void zero_tile() {
  std::memset(tile(T).bytes, 0, sizeof t_tiles[T].bytes);
}

// Sum [tokens, 16] += tokens [tokens, bytes of columns] x weights [16 quads of columns, rows x 4].
template <class Number, class Product>
void multiply_with(Tile& sum, const Tile& tokens, const Tile& weights, Product product) {
  if (sum.rows != tokens.rows || weights.rows != kTileRows) __builtin_trap();
  for (int64_t t = 0; t < tokens.rows; t++) {
    Number sums[kRows];
    std::memcpy(sums, sum.bytes[t], sizeof sums);
    for (int64_t quad = 0; quad < weights.rows; quad++)
      for (int64_t r = 0; r < kRows; r++)
        sums[r] += product(tokens.bytes[t] + 4 * quad, weights.bytes[quad] + 4 * r);
    std::memcpy(sum.bytes[t], sums, sizeof sums);
  }
}

template <int Sum, int Tokens, int Weights>
void multiply_tiles(std::true_type) {
  multiply_with<float>(tile(Sum), tile(Tokens), tile(Weights),
                       [](const uint8_t* x, const uint8_t* w) {
                         return from_bf16(load<uint16_t>(x)) * from_bf16(load<uint16_t>(w)) +
                                from_bf16(load<uint16_t>(x + 2)) * from_bf16(load<uint16_t>(w + 2));
                       });
}
template <int Sum, int Tokens, int Weights>
void multiply_tiles(std::false_type) {
  multiply_with<int32_t>(tile(Sum), tile(Tokens), tile(Weights),
                         [](const uint8_t* x, const uint8_t* w) {
                           int32_t sum = 0;
                           for (int i = 0; i < 4; i++) sum += static_cast<int8_t>(x[i]) * w[i];
                           return sum;
                         });
}

class TileRegisters {
 public:
  explicit TileRegisters(int64_t tokens) {
    for (int i = 0; i < 8; i++) t_tiles[i].rows = i < 6 ? tokens : kTileRows;
    t_set_up = true;
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { t_set_up = false; }
};

inline bool has_tiles() { return true; }
inline bool may_use_tiles() { return true; }

}  // namespace
