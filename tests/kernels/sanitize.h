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
      for (int64_t k = 0; k < columns; k++) {
        bool keep = kind == GBLM_DENSE || r.below(sparse ? 16 : 4) < density;
        if (kind == GBLM_4_OF_8) keep = (k % 4 == row % 4) || (k % 4 == (row + 1 + k / 4 % 3) % 4);
        if (kind == GBLM_8_OF_16) keep = keeps_of_16(row, k);
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
  // Three to five of each half, eight together, another choice in every row.
  static bool keeps_of_16(int64_t row, int64_t k) {
    const int64_t first = 3 + (row + k / 16) % 3, count = k % 16 < 8 ? first : 8 - first;
    return (k * 3 + row) % 8 < count;
  }

  double append(int32_t values, int64_t index, Random& r) {
    if (values == GBLM_BF16) {
      const uint16_t half = r.bf16();
      data.push_back(static_cast<uint8_t>(half & 255));
      data.push_back(static_cast<uint8_t>(half >> 8));
      return from_bf16(half);
    }
    if (values == GBLM_INT8) {
      const auto code = static_cast<int>(r.below(255)) - 127;
      data.push_back(static_cast<uint8_t>(code));
      return code;
    }
    const auto code = static_cast<int>(r.below(15)) - 7;
    if (index % 2 == 0)
      data.push_back(static_cast<uint8_t>(code & 15));
    else
      data.back() |= static_cast<uint8_t>((code & 15) << 4);
    return code;
  }
};
