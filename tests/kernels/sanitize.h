// Random weights as they lie on disk, for sanitize.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../../toolkit/kernels/csrc/gblm_kernels.h"

struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t limit) {
    return static_cast<int64_t>(next() % static_cast<uint64_t>(limit));
  }
  uint16_t bf16() {  // -2 .. 2, a few zeros and subnormals among them
    const auto bits = static_cast<uint16_t>(next() & 0x807F);
    return below(16) == 0 ? bits : static_cast<uint16_t>(bits | (120 + below(8)) << 7);
  }
};

float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Weight {
  std::vector<uint8_t> data, bitmask, mask;
  std::vector<int64_t> starts;
  std::vector<uint16_t> scales;
  std::vector<double> dense;
  gblm_source source{};

  void fill(int64_t rows, int64_t columns, int32_t values, int32_t kind, int64_t group, Random& r) {
    if (values != GBLM_BF16)
      for (int64_t i = 0; i < rows * (columns / group); i++)
        scales.push_back(static_cast<uint16_t>(0x3C00 + r.below(256)));
    bitmask.assign(static_cast<size_t>(rows * columns / 8), 0);
    starts.assign(1, 0);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t density = r.below(5);  // whole rows of zeros and of values, too
      const bool sparse = rows == 50;
      int64_t kept = 0;
      unsigned pattern = 0;
      for (int64_t k = 0; k < columns; k++) {
        if (kind >= GBLM_4_OF_8 && k % 16 == 0) pattern = half_of_16(kind, r);
        const bool keep = kind == GBLM_DENSE    ? true
                          : kind >= GBLM_4_OF_8 ? pattern >> k % 16 & 1
                                                : r.below(sparse ? 16 : 4) < density;
        mask.push_back(keep);
        double value = 0;
        if (keep) {
          bitmask[static_cast<size_t>((row * columns + k) / 8)] |= static_cast<uint8_t>(1 << k % 8);
          value = append(values, kept++, r);
          if (group) value *= from_bf16(scales[static_cast<size_t>((row * columns + k) / group)]);
        }
        dense.push_back(value);
      }
      starts.push_back(static_cast<int64_t>(data.size()));
    }
    data.shrink_to_fit();  // so that one byte too far is seen
    source = {rows,
              columns,
              values,
              kind,
              group,
              data.data(),
              static_cast<int64_t>(data.size()),
              bitmask.data(),
              starts.data(),
              scales.data()};
  }

 private:
  static unsigned some_of_8(int64_t count, Random& r) {
    for (;;) {
      const auto bits = static_cast<unsigned>(r.below(256));
      if (__builtin_popcount(bits) == count) return bits;
    }
  }
  // Eight of sixteen columns; three to five in each half where that is allowed.
  static unsigned half_of_16(int32_t kind, Random& r) {
    const int64_t first = kind == GBLM_8_OF_16 ? 3 + r.below(3) : 4;
    const unsigned low = some_of_8(first, r);
    return low | some_of_8(8 - first, r) << 8;
  }

  double append(int32_t values, int64_t index, Random& r) {
    if (values == GBLM_BF16) {
      const uint16_t half = r.bf16();
      data.push_back(static_cast<uint8_t>(half & 255));
      data.push_back(static_cast<uint8_t>(half >> 8));
      return from_bf16(half);
    }
    if (values == GBLM_INT8) {
      const auto code = static_cast<int>(r.below(256)) - 128;
      data.push_back(static_cast<uint8_t>(code));
      return code;
    }
    const auto code = static_cast<int>(r.below(16)) - 8;
    if (index % 2 == 0)
      data.push_back(static_cast<uint8_t>(code & 15));
    else
      data.back() |= static_cast<uint8_t>((code & 15) << 4);
    return code;
  }
};
