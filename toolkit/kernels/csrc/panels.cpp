// Checking panels, and reading them back into a matrix.
#include "panels.h"

namespace {

struct Sink {
  int32_t stored;  // GBLM_BF16 …
  void* values;
  uint8_t* mask;
  int64_t columns;

  void put(int64_t row, int64_t column, const uint8_t* at, int shift) const {
    const int64_t index = row * columns + column;
    mask[index] = 1;
    if (stored == GBLM_BF16)
      std::memcpy(static_cast<uint8_t*>(values) + 2 * index, at, 2);
    else if (stored == GBLM_INT8)
      static_cast<uint8_t*>(values)[index] = *at ^ 0x80;
    else
      static_cast<uint8_t*>(values)[index] = static_cast<uint8_t>((*at >> shift & 15) - 8);
  }
};

// The planes of one block.
const uint8_t* read_planes(const Panels& p, const uint8_t* at, int64_t row, int64_t column,
                           const Sink& sink) {
  for (int64_t r = 0; r < smaller(kRows, p.rows - row); r++)
    for (int byte = 0; byte < smaller<int64_t>(4, (p.columns - column) / 8); byte++) {
      int k = 0;
      for (unsigned bits = at[4 * r + byte]; bits != 0 && k < 5; bits &= bits - 1, k++) {
        const Place place = find_place(p.values, r, byte, k);
        sink.put(row + r, column + 8 * byte + __builtin_ctz(bits), at + kMaskBytes + place.offset,
                 place.shift);
      }
    }
  return at + p.block_bytes;
}

// The words of one block; returns where the next one begins.
const uint8_t* read_block(const Panels& p, const uint8_t* at, int64_t row, int64_t column,
                          const Sink& sink) {
  const bool wide = p.values == GBLM_BF16;
  const int words = wide ? 16 : 8, per_word = wide ? 2 : 4, lanes = wide ? 32 : 64;
  const uint8_t* masks = at;
  if (p.mask != GBLM_DENSE) at += kMaskBytes;
  const uint8_t* run_start = at;
  int64_t longest = 0;
  for (int w = 0; w < words; w++) {
    uint64_t mask = ~uint64_t{0} >> (64 - lanes);
    if (p.mask != GBLM_DENSE)
      mask = wide ? load<uint32_t>(masks + 4 * w) : load<uint64_t>(masks + 8 * w);
    const uint8_t* v = p.values == GBLM_INT4 ? run_start : at;
    for (; mask != 0; mask &= mask - 1, v += wide ? 2 : 1) {
      const int lane = __builtin_ctzll(mask);
      const int64_t r = row + lane / per_word, c = column + w * per_word + lane % per_word;
      if (r < p.rows && c < p.columns) sink.put(r, c, v, w % 2 * 4);
    }
    at = v;
    if (p.values == GBLM_INT4) {
      longest = w % 2 == 0 ? v - run_start : larger<int64_t>(longest, v - run_start);
      if (w % 2 == 1) run_start += longest;
      at = run_start;
    }
  }
  return at;
}

}  // namespace

int open_panels(const void* memory, int64_t bytes, Panels* p) {
  if (memory == nullptr || bytes < kLine) return GBLM_BAD_PANELS;
  const Header h = load<Header>(memory);
  const bool known = h.magic == kMagic && h.version == kVersion && h.bytes == bytes && h.rows > 0 &&
                     h.rows <= kMaxExtent && h.columns > 0 && h.columns <= kMaxExtent &&
                     h.columns % 8 == 0 && h.values >= GBLM_BF16 && h.values <= GBLM_INT4 &&
                     h.mask >= GBLM_DENSE && h.mask <= GBLM_8_OF_16;
  if (!known) return GBLM_BAD_PANELS;
  const bool group_fits = is_integer(h.values)
                              ? h.group >= kColumns && h.group <= kMaxGroup &&
                                    h.group % kColumns == 0 && h.columns % h.group == 0
                              : h.group == 0;
  if (!group_fits) return GBLM_BAD_PANELS;
  const auto* base = static_cast<const uint8_t*>(memory);
  p->rows = h.rows;
  p->columns = h.columns;
  p->group = h.group;
  p->blocks = (h.columns + kColumns - 1) / kColumns;
  p->count = (h.rows + kRows - 1) / kRows;
  p->values = h.values;
  p->mask = h.mask;
  p->block_bytes = block_size(h.values, h.mask);
  p->base = base;
  p->limit = base + bytes - slack(h.values);
  const int64_t first = first_panel(p->count), last = bytes - slack(h.values);
  // No block is smaller than a line: a claimed shape never needs more memory than panels justify.
  if (first > last || p->blocks * p->count > (last - first) / kLine) return GBLM_BAD_PANELS;
  return p->offset(0) == static_cast<uint64_t>(first) &&
                 p->offset(p->count) == static_cast<uint64_t>(last)
             ? GBLM_OK
             : GBLM_BAD_PANELS;
}

extern "C" {

int gblm_inspect(const void* memory, int64_t bytes, gblm_info* info) {
  Panels p;
  if (info == nullptr) return GBLM_BAD_ARGUMENT;
  if (const int result = open_panels(memory, bytes, &p)) return result;
  *info = {p.rows, p.columns, p.group, bytes, p.values, p.mask};
  return GBLM_OK;
}

int gblm_unpack(const void* memory, int64_t bytes, void* values, uint8_t* mask, uint16_t* scales) {
  Panels p;
  if (const int result = open_panels(memory, bytes, &p)) return result;
  if (values == nullptr || mask == nullptr || (scales == nullptr && is_integer(p.values)))
    return GBLM_BAD_ARGUMENT;
  const auto size = static_cast<size_t>(p.rows * p.columns);
  std::memset(values, 0, size * (is_integer(p.values) ? 1 : 2));
  std::memset(mask, 0, size);
  const Sink sink{p.values, values, mask, p.columns};
  const int64_t groups = p.group ? p.columns / p.group : 0;
  for (int64_t panel = 0; panel < p.count; panel++) {
    const uint8_t* at = p.begin(panel);
    const uint8_t* line = nullptr;
    for (int64_t block = 0; block < p.blocks; block++) {
      if (groups != 0 && block * kColumns % p.group == 0) {
        const int64_t group = block * kColumns / p.group;
        if (!p.open_group(group, &at, &line)) return GBLM_BAD_PANELS;
        for (int64_t r = 0; r < kRows && panel * kRows + r < p.rows; r++)
          std::memcpy(scales + (panel * kRows + r) * groups + group, line + 2 * r, 2);
      }
      if (at > p.limit) return GBLM_BAD_PANELS;
      const auto read = has_planes(p.mask) ? read_planes : read_block;
      at = read(p, at, panel * kRows, block * kColumns, sink);
    }
    if (!p.ends(panel, at)) return GBLM_BAD_PANELS;
  }
  return GBLM_OK;
}

}  // extern "C"
