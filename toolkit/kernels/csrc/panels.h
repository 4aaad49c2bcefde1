// The layout of panels, shared by all instruction sets.
//
//   header (64 B) | offsets u64 [panels + 1] | panels, the first one 64-byte aligned | slack
//
// A panel is 16 rows; rows and columns are padded with zeros. A block is 16 rows x 32 columns:
// 64 B of masks, then the kept values of word after word. A word is what one register expands to:
// bf16: 16 rows x 2 columns, 32-bit mask, bit 2 row + (column & 1); integers: 16 rows x 4 columns,
// 64-bit mask, bit 4 row + (column & 3). int4 words 2i and 2i + 1 share a run of bytes: low
// nibbles are word 2i, high nibbles word 2i + 1, as long as the larger of the two. Dense blocks
// have no masks. Integers are stored + 128, int4 + 8: the instructions want one factor unsigned.
// Before every second group stands a line with the scales of two, bf16 [2][16].
//
// Blocks of N:M weights hold planes instead of words. Their 64 B of masks are 32 bits for each row,
// bit i for column i. Each byte of mask, eight columns, keeps four, or three to five. Plane k = 0
// to 3 has the k-th kept weight of every byte, in the byte's place: 4 row + byte. A byte with three
// leaves its place in plane 3 to the fifth of its neighbour, byte ^ 1. int4 planes 0 and 1 are the
// low and high nibbles of a line, 2 and 3 those of the next; a bf16 plane is two lines, first bytes
// 0 and 2 of the rows, then 1 and 3. Rows and columns that are missing keep the first four, zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "gblm_kernels.h"

namespace {  // every translation unit has its own copy: they are compiled for different CPUs

constexpr uint32_t kMagic = 0x4D4C4247;  // "GBLM"
constexpr uint32_t kVersion = 3;
constexpr int64_t kRows = 16, kColumns = 32, kLine = 64;
constexpr int64_t kMaskBytes = 64;
constexpr int64_t kMaxGroup = 256;  // two panels of it fit every kernel's cache
constexpr int64_t kMaxExtent = int64_t{1} << 24;
// Groups of activations below it count as zeros: 127 / x must be finite.
constexpr float kLeast = 0x1p-120f;

struct Header {
  uint32_t magic, version;
  int64_t rows, columns, group, bytes;
  int32_t values, mask;
  uint8_t reserved[16];
};
static_assert(sizeof(Header) == kLine);

// Not std::min and std::max: the linker keeps one copy of those, perhaps one for another CPU.
template <class T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

constexpr bool is_integer(int32_t values) { return values != GBLM_BF16; }
constexpr bool has_planes(int32_t mask) { return mask >= GBLM_4_OF_8; }
// Bytes of so many weights of a block.
constexpr int64_t value_bytes(int32_t values, int64_t count) {
  return values == GBLM_BF16 ? 2 * count : values == GBLM_INT8 ? count : count / 2;
}
constexpr int64_t block_size(int32_t values, int32_t mask) {
  return mask == GBLM_ANY     ? 0
         : mask == GBLM_DENSE ? value_bytes(values, kRows * kColumns)
                              : kMaskBytes + value_bytes(values, kRows * kColumns / 2);
}
// Where a block of planes has the k-th kept weight of a byte of a row's mask: bytes from plane 0
// on, and by how many bits its nibble is shifted.
struct Place {
  int64_t offset;
  int shift;
};
constexpr Place find_place(int32_t values, int64_t row, int byte, int k) {
  const int plane = k < 4 ? k : 3, place = k < 4 ? byte : byte ^ 1;
  if (values == GBLM_BF16) return {kLine * (2 * plane + place % 2) + 4 * row + place / 2 * 2, 0};
  if (values == GBLM_INT8) return {kLine * plane + 4 * row + place, 0};
  return {kLine * (plane / 2) + 4 * row + place, plane % 2 * 4};
}
// A block may start at most this far before the end, whatever its masks say.
constexpr int64_t slack(int32_t values) {
  return values == GBLM_BF16 ? 2048 : values == GBLM_INT8 ? 1024 : 512;
}
// Bytes of the scales of so many groups, of a panel.
constexpr int64_t scale_bytes(int64_t groups) { return (groups + 1) / 2 * kLine; }
// Where panels begin, behind the header and their offsets.
constexpr int64_t first_panel(int64_t panels) { return kLine + round_up(8 * (panels + 1), kLine); }

}  // namespace

// Panels whose header and offsets have been checked. Members are always inlined: the linker would
// keep one copy of them for all instruction sets.
#define GBLM_INLINE inline __attribute__((always_inline))
struct Panels {
  int64_t rows, columns, group, blocks, count;
  int32_t values, mask;
  int64_t block_bytes;  // 0 where blocks differ
  const uint8_t* base;
  const uint8_t* limit;  // no block starts behind it

  // From bytes, so that panels may lie anywhere.
  GBLM_INLINE uint64_t offset(int64_t panel) const {
    uint64_t value;
    std::memcpy(&value, base + 64 + 8 * panel, 8);
    return value;
  }
  // Behind the limit when the offset is, so that no block is read there.
  GBLM_INLINE const uint8_t* begin(int64_t panel) const {
    const uint64_t at = offset(panel);
    return at <= static_cast<uint64_t>(limit - base) ? base + at : limit + 1;
  }
  // A panel whose blocks have one size; nullptr when it has another length, or lies outside.
  GBLM_INLINE const uint8_t* whole(int64_t panel) const {
    const uint64_t at = offset(panel), end = static_cast<uint64_t>(limit - base);
    const uint64_t scales = group == 0 ? 0 : static_cast<uint64_t>(scale_bytes(columns / group));
    const uint64_t bytes = scales + static_cast<uint64_t>(blocks * block_bytes);
    return at <= end && end - at >= bytes && offset(panel + 1) == at + bytes ? base + at : nullptr;
  }
  // Where a group begins: `scales` steps to its own, bf16 [16]; of two groups they share the line
  // before the first. False when damaged.
  GBLM_INLINE bool open_group(int64_t group, const uint8_t** at, const uint8_t** scales) const {
    if (group % 2 != 0) {
      *scales += 32;
      return true;
    }
    if (__builtin_expect(*at > limit, 0)) return false;
    *scales = *at;
    *at += 64;
    return true;
  }
  // Whether what was read up to `at` is the whole panel.
  GBLM_INLINE bool ends(int64_t panel, const uint8_t* at) const {
    return static_cast<uint64_t>(at - base) == offset(panel + 1);
  }
};

namespace {

inline float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Tasks 0 … tasks - 1 on the host's threads, or one after the other.
inline void run(const gblm_pool* pool, int64_t tasks, void (*task)(void*, int64_t), void* context) {
  if (pool != nullptr && tasks > 1)
    pool->run(pool->self, tasks, task, context);
  else
    for (int64_t i = 0; i < tasks; i++) task(context, i);
}

// Known before the first call; it decides how memory is asked ahead.
#if defined(__x86_64__)
const bool kOnZen = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
const bool kOnZen4 = kOnZen && __builtin_cpu_is("amdfam19h");
#else
constexpr bool kOnZen = false;
#endif

template <class T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace

int open_panels(const void* memory, int64_t bytes, Panels* panels);
