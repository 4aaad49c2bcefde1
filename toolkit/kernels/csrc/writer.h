// Writes one panel of prepare.cpp: rows of kept values become words of sixteen rows.
#pragma once

#include "panels.h"

namespace {

constexpr uint64_t kNibbles = 0x1111111111111111, kBytes = 0x0101010101010101;

struct Shape {
  int64_t panels, blocks, groups, group;  // group: columns per scale in the panels
};

// 1 bits of the bytes b .. b + 7 of a row's mask that lie inside of the matrix.
inline uint64_t whole_bytes(const gblm_source& s, int64_t b) {
  const int64_t left = s.columns / 8 - b;
  return left >= 8 ? ~uint64_t{0} : left <= 0 ? 0 : (uint64_t{1} << 8 * left) - 1;
}

// The mask of up to 64 columns of a row, from byte b on; nothing is kept outside of the matrix.
inline uint64_t row_bits(const gblm_source& s, int64_t row, int64_t b) {
  const uint64_t inside = row < s.rows ? whole_bytes(s, b) : 0;
  if (inside == 0 || s.mask == GBLM_DENSE) return inside;
  const uint8_t* at = s.bitmask + row * (s.columns / 8) + b;
  if (inside == ~uint64_t{0}) return load<uint64_t>(at);
  uint64_t bits = 0;
  std::memcpy(&bits, at, static_cast<size_t>(s.columns / 8 - b));
  return bits;
}

// Counting bits, first in pairs, then in fours; without an instruction that old CPUs lack.
inline uint64_t count_pairs(uint64_t bits) { return bits - (bits >> 1 & kNibbles * 5); }
inline uint64_t count_nibbles(uint64_t pairs) {
  return (pairs & kNibbles * 3) + (pairs >> 2 & kNibbles * 3);
}
inline uint64_t count_bytes(uint64_t nibbles) {
  return (nibbles & kBytes * 15) + (nibbles >> 4 & kBytes * 15);
}
inline int64_t sum_bytes(uint64_t counts) { return static_cast<int64_t>(counts * kBytes >> 56); }

// Bytes 0 .. count - 1 of four.
inline uint32_t low_bytes(uint32_t four, int count) {
  return four & static_cast<uint32_t>((uint64_t{1} << 8 * count) - 1);
}

// The stored values of a row, in their order.
template <int Values>
struct Cursor {
  const uint8_t* data = nullptr;
  const uint8_t* end = nullptr;
  int64_t index = 0;  // in values

  // The next values, as many as a word has of a row at most, zeros after the first `count`: two of
  // bf16, four of int8, four of int4 in a byte each.
  uint32_t take(int count) {
    const int64_t at = index;
    index += count;
    if constexpr (Values == GBLM_BF16) return low_bytes(load_four(data + 2 * at), 2 * count);
    if constexpr (Values == GBLM_INT8) return low_bytes(load_four(data + at), count);
    uint32_t codes = load_four(data + at / 2) >> at % 2 * 4 & 0xFFFF;
    codes = (codes | codes << 8) & 0x00FF00FF;
    return low_bytes((codes | codes << 4) & 0x0F0F0F0F, count);
  }

  // What lies behind the row's end is not this row's to read.
  uint32_t load_four(const uint8_t* at) const {
    if (end - at >= 4) return load<uint32_t>(at);
    uint32_t four = 0;
    if (at < end) std::memcpy(&four, at, static_cast<size_t>(end - at));
    return four;
  }

  // No NaN, no Inf; every byte and every nibble is a code.
  bool allowed() const {
    bool bad = false;
    if constexpr (Values == GBLM_BF16)
      for (const uint8_t* at = data; at < end; at += 2)
        bad |= (load<uint16_t>(at) & 0x7F80) == 0x7F80;
    return !bad;
  }
};

template <int Values>
class Writer {
  static constexpr int kPerWord = Values == GBLM_BF16 ? 2 : 4;  // columns
  static constexpr int kWords = kColumns / kPerWord, kSize = Values == GBLM_BF16 ? 2 : 1;
  static constexpr int kLanes = kPerWord * kRows;
  // Of four codes: they are stored unsigned.
  static constexpr uint32_t kOffset = Values == GBLM_INT8   ? 0x80808080
                                      : Values == GBLM_INT4 ? 0x08080808
                                                            : 0;

 public:
  Writer(const gblm_source& source, const Shape& shape, int64_t panel, uint8_t* to)
      : s_(source), shape_(shape), first_(panel * kRows), to_(to) {
    for (int64_t r = 0; r < kRows && first_ + r < s_.rows; r++) {
      const auto* data = static_cast<const uint8_t*>(s_.data);
      cursors_[r].data = data + s_.starts[first_ + r];
      cursors_[r].end = data + s_.starts[first_ + r + 1];
      if (!cursors_[r].allowed()) good_ = false;
    }
  }

  // Where the panel ends; nullptr when a value or a scale is not what it must be.
  uint8_t* write() {
    for (int64_t block = 0; block < shape_.blocks; block++) {
      if (Values != GBLM_BF16 && block * kColumns % (2 * shape_.group) == 0)
        write_scales(block * kColumns / shape_.group);
      if (has_planes(s_.mask))
        write_planes(block);
      else
        write_block(block);
    }
    return good_ ? to_ : nullptr;
  }

 private:
  // One block: its masks, then its words. Values go through a buffer, because the last store of a
  // word may go beyond it.
  void write_block(int64_t block) {
    uint32_t real[kRows], stored[kRows];
    for (int64_t r = 0; r < kRows; r++) {
      real[r] = static_cast<uint32_t>(row_bits(s_, first_ + r, block * kColumns / 8));
      stored[r] = s_.mask == GBLM_DENSE ? ~uint32_t{0} : real[r];
    }
    if (s_.mask != GBLM_DENSE) write_masks(stored);
    uint8_t words[2][kLanes * kSize + 4];
    for (int w = 0; w < kWords; w += 2) {
      if (Values == GBLM_INT4) std::memset(words, 0, sizeof words);
      const int64_t a = fill_word(w, real, stored, words[0]);
      const int64_t b = fill_word(w + 1, real, stored, words[1]);
      if (Values == GBLM_INT4) {
        for (int64_t i = 0; i < larger(a, b); i++)
          *to_++ = static_cast<uint8_t>((words[0][i] & 15) | words[1][i] << 4);
      } else {
        std::memcpy(to_, words[0], static_cast<size_t>(a * kSize));
        std::memcpy(to_ + a * kSize, words[1], static_cast<size_t>(b * kSize));
        to_ += (a + b) * kSize;
      }
    }
  }

  void write_masks(const uint32_t (&stored)[kRows]) {
    for (int w = 0; w < kWords; w++) {
      uint64_t mask = 0;
      for (int r = 0; r < kRows; r++)
        mask |= uint64_t{stored[r] >> w * kPerWord & ((1u << kPerWord) - 1)} << r * kPerWord;
      std::memcpy(to_ + w * kLanes / 8, &mask, kLanes / 8);
    }
    to_ += kMaskBytes;
  }

  // The values of one word: those of a row lie together, and what is stored too much is covered by
  // the next row's. Returns how many are kept.
  int64_t fill_word(int w, const uint32_t (&real)[kRows], const uint32_t (&stored)[kRows],
                    uint8_t* word) {
    int64_t count = 0;
    for (int r = 0; r < kRows; r++) {
      const uint32_t four = cursors_[r].take(count_kept(real[r], w)) ^ kOffset;
      std::memcpy(word + count * kSize, &four, 4);
      count += count_kept(stored[r], w);
    }
    return count;
  }

  // Weights of one row that are kept in a word.
  static int count_kept(uint32_t mask, int w) {
    static constexpr uint8_t counts[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
    return counts[mask >> w * kPerWord & ((1u << kPerWord) - 1)];
  }

  // One block of masks and planes. What is missing keeps the first four columns, as zeros.
  void write_planes(int64_t block) {
    uint8_t* const planes = to_ + kMaskBytes;
    const int64_t bytes = block_size(Values, s_.mask) - kMaskBytes;
    constexpr int zero = Values == GBLM_INT8 ? 0x80 : Values == GBLM_INT4 ? 0x88 : 0;
    std::memset(planes, zero, static_cast<size_t>(bytes));
    for (int r = 0; r < kRows; r++) {
      const uint32_t mask = static_cast<uint32_t>(row_bits(s_, first_ + r, block * kColumns / 8));
      for (int byte = 0; byte < 4; byte++) {
        const uint32_t bits = mask >> 8 * byte & 255;
        to_[4 * r + byte] = static_cast<uint8_t>(bits == 0 ? 15 : bits);
        for (int k = 0; k < __builtin_popcount(bits); k++)
          put(planes, find_place(Values, r, byte, k), cursors_[r].take(1));
      }
    }
    to_ = planes + bytes;
  }

  static void put(uint8_t* planes, const Place& place, uint32_t value) {
    if constexpr (Values == GBLM_INT4)
      planes[place.offset] ^= static_cast<uint8_t>(value << place.shift);
    else if constexpr (Values == GBLM_INT8)
      planes[place.offset] ^= static_cast<uint8_t>(value);
    else
      std::memcpy(planes + place.offset, &value, 2);
  }

  // The line of a group and the next one. Scales are finite and not negative; the pieces of a long
  // group share theirs.
  void write_scales(int64_t first) {
    const int64_t groups = s_.columns / s_.group, pieces = s_.group / shape_.group;
    std::memset(to_, 0, kLine);
    for (int64_t g = first; g < smaller(first + 2, shape_.groups); g++)
      for (int64_t r = 0; r < kRows && first_ + r < s_.rows; r++) {
        const uint16_t scale = s_.scales[(first_ + r) * groups + g / pieces];
        if ((scale & 0x7F80) == 0x7F80 || scale >> 15) good_ = false;
        std::memcpy(to_ + 2 * ((g - first) * kRows + r), &scale, 2);
      }
    to_ += kLine;
  }

  const gblm_source& s_;
  const Shape& shape_;
  int64_t first_;
  uint8_t* to_;
  bool good_ = true;
  Cursor<Values> cursors_[kRows];
};

}  // namespace
