// Disk layout to panels. Plain C++: it runs once, at load, and every CPU can do it.
#include <atomic>
#include <new>
#include <vector>

#include "panels.h"

namespace {

constexpr uint32_t kTwoOfFour = 0x33333333;  // any mask with two of four will do for padding

struct Shape {
  int64_t panels, blocks, groups, group;  // group: columns per line of scales in the panels
};

// Codes of a group are summed in 16 bits, so long groups are cut; the pieces share their scale.
int64_t panel_group(int64_t group) {
  for (int64_t size = kMaxGroup; size >= kColumns; size /= 2)
    if (group % size == 0) return size;
  return 0;
}

bool check_shape(const gblm_source& s, Shape* shape) {
  const bool ranges = s.rows > 0 && s.rows <= kMaxExtent && s.columns > 0 &&
                      s.columns <= kMaxExtent && s.columns % 8 == 0 && s.data_bytes >= 0 &&
                      s.values >= GBLM_BF16 && s.values <= GBLM_INT4 && s.mask >= GBLM_DENSE &&
                      s.mask <= GBLM_2_OF_4;
  if (!ranges || (s.data == nullptr && s.data_bytes > 0) || s.starts == nullptr) return false;
  if (s.mask != GBLM_DENSE && s.bitmask == nullptr) return false;
  *shape = {(s.rows + kRows - 1) / kRows, (s.columns + kColumns - 1) / kColumns, 0, 0};
  if (!is_integer(s.values)) return s.group == 0;
  if (s.scales == nullptr || s.group <= 0 || s.columns % s.group != 0) return false;
  shape->group = panel_group(s.group);
  if (shape->group == 0 || s.columns % kColumns != 0) return false;
  shape->groups = s.columns / shape->group;
  return true;
}

// Mask of 8 columns of a row; nothing is kept outside of the matrix.
uint32_t mask8(const gblm_source& s, int64_t row, int64_t byte) {
  if (row >= s.rows || byte >= s.columns / 8) return 0;
  return s.mask == GBLM_DENSE ? 0xFF : s.bitmask[row * (s.columns / 8) + byte];
}

int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

// A row's stored values end where the next row's begin, and there are as many as mask bits.
bool check_row(const gblm_source& s, int64_t row) {
  int64_t kept = 0;
  for (int64_t b = 0; b < s.columns / 8; b++) {
    const uint32_t mask = mask8(s, row, b);
    kept += count_bits(mask);
    if (s.mask == GBLM_2_OF_4 && (count_bits(mask & 15) != 2 || count_bits(mask >> 4) != 2))
      return false;
  }
  const int64_t bytes = s.values == GBLM_BF16   ? 2 * kept
                        : s.values == GBLM_INT8 ? kept
                                                : (kept + 1) / 2;
  const int64_t first = s.starts[row], last = s.starts[row + 1];
  return first >= 0 && first <= last && last <= s.data_bytes && last - first == bytes;
}

// Bytes of a panel's values and masks.
int64_t measure_panel(const gblm_source& s, const Shape& shape, int64_t panel) {
  const int64_t masks = s.mask == GBLM_DENSE ? 0 : shape.blocks * kMaskBytes;
  int64_t values = 0;  // in stored units: for int4, bytes
  for (int64_t b = 0; b < shape.blocks * kColumns / 8; b++) {
    int low = 0, high = 0;
    for (int64_t r = 0; r < kRows; r++) {
      const uint32_t mask = mask8(s, panel * kRows + r, b);
      low += count_bits(mask & 15);
      high += count_bits(mask >> 4);
    }
    // Padding is stored, too, where the reader counts on full words.
    if (s.mask == GBLM_2_OF_4) low = high = 2 * kRows;
    if (s.mask == GBLM_DENSE) low = high = 4 * kRows;
    values += s.values == GBLM_INT4 ? larger(low, high) : low + high;
  }
  if (s.values == GBLM_BF16) values *= 2;
  return masks + values + shape.groups * kLine;
}

// One stored value after the other of one row.
struct Cursor {
  const uint8_t* data;
  int64_t index = 0;

  uint16_t bf16() { return load<uint16_t>(data + 2 * index++); }
  uint8_t int8() { return data[index++]; }
  uint8_t int4() {
    const uint8_t nibble = data[index / 2] >> (index % 2 * 4) & 15;
    index++;
    return static_cast<uint8_t>(nibble ^ 8) - 8;
  }
};

// A block as 16 rows x 32 columns in the order of the words; Value is uint16_t or uint8_t.
template <class Value>
struct Tile {
  static constexpr int kPerWord = sizeof(Value) == 2 ? 2 : 4;  // columns
  static constexpr int kLanes = kPerWord * kRows, kWords = kColumns / kPerWord;
  Value values[kWords][kLanes];
  uint64_t masks[kWords];
};

template <class Value, class Next>
void fill_row(Tile<Value>& tile, int64_t row, uint32_t mask, Next&& next) {
  constexpr int per_word = Tile<Value>::kPerWord;
  for (; mask != 0; mask &= mask - 1) {
    const int column = __builtin_ctz(mask);
    const int lane = static_cast<int>(row) * per_word + column % per_word;
    tile.values[column / per_word][lane] = next();
    tile.masks[column / per_word] |= uint64_t{1} << lane;
  }
}

uint8_t* write_masks(const Tile<uint16_t>& tile, uint8_t* to) {
  for (int w = 0; w < tile.kWords; w++) {
    const uint32_t mask = static_cast<uint32_t>(tile.masks[w]);
    std::memcpy(to + 4 * w, &mask, 4);
  }
  return to + kMaskBytes;
}
uint8_t* write_masks(const Tile<uint8_t>& tile, uint8_t* to) {
  std::memcpy(to, tile.masks, kMaskBytes);
  return to + kMaskBytes;
}

template <class Value>
uint8_t* write_words(const Tile<Value>& tile, uint8_t* to) {
  for (int w = 0; w < tile.kWords; w++)
    for (uint64_t mask = tile.masks[w]; mask != 0; mask &= mask - 1) {
      std::memcpy(to, &tile.values[w][__builtin_ctzll(mask)], sizeof(Value));
      to += sizeof(Value);
    }
  return to;
}

uint8_t* write_nibbles(const Tile<uint8_t>& tile, uint8_t* to) {
  for (int w = 0; w < tile.kWords; w += 2) {
    uint64_t low = tile.masks[w], high = tile.masks[w + 1];
    for (; (low | high) != 0; low &= low - 1, high &= high - 1) {
      const int a = low ? tile.values[w][__builtin_ctzll(low)] : 0;
      const int b = high ? tile.values[w + 1][__builtin_ctzll(high)] : 0;
      *to++ = static_cast<uint8_t>((a & 15) | b << 4);
    }
  }
  return to;
}

// Writes one panel.
class Writer {
 public:
  Writer(const gblm_source& source, const Shape& shape, int64_t panel, uint8_t* to)
      : s_(source), shape_(shape), first_(panel * kRows), to_(to) {
    for (int64_t r = 0; r < kRows && first_ + r < s_.rows; r++)
      cursors_[r].data = static_cast<const uint8_t*>(s_.data) + s_.starts[first_ + r];
  }

  // Where the panel ends; nullptr when a value is not finite or a code out of range.
  uint8_t* write() {
    for (int64_t block = 0; block < shape_.blocks; block++) {
      if (is_integer(s_.values) && block * kColumns % shape_.group == 0) begin_group(block);
      if (is_integer(s_.values))
        write_block<uint8_t>(block);
      else
        write_block<uint16_t>(block);
    }
    finish_group();
    return good_ ? to_ : nullptr;
  }

 private:
  uint32_t row_mask(int64_t row, int64_t block) const {
    uint32_t mask = 0;
    for (int64_t b = 0; b < kColumns / 8; b++)
      mask |= mask8(s_, first_ + row, block * kColumns / 8 + b) << 8 * b;
    return mask;
  }

  uint16_t next(uint16_t, Cursor& cursor, int64_t) {
    const uint16_t value = cursor.bf16();
    if ((value & 0x7F80) == 0x7F80) good_ = false;
    return value;
  }
  uint8_t next(uint8_t, Cursor& cursor, int64_t row) {
    const uint8_t code = s_.values == GBLM_INT8 ? cursor.int8() : cursor.int4();
    const int value = static_cast<int8_t>(code);
    if (value < (s_.values == GBLM_INT8 ? -127 : -7)) good_ = false;
    sums_[row] += value;
    return code;
  }

  template <class Value>
  void write_block(int64_t block) {
    Tile<Value> tile;
    std::memset(&tile, 0, sizeof tile);
    for (int64_t r = 0; r < kRows; r++) {
      const uint32_t mask = row_mask(r, block);
      fill_row(tile, r, mask, [&] { return next(Value{}, cursors_[r], r); });
      if (s_.mask == GBLM_2_OF_4)
        fill_row(tile, r, kTwoOfFour & ~spread(mask), [] { return Value{0}; });
    }
    if (s_.mask == GBLM_DENSE)
      for (uint64_t& mask : tile.masks) mask = ~uint64_t{0} >> (64 - tile.kLanes);
    else
      to_ = write_masks(tile, to_);
    if constexpr (sizeof(Value) == 1) {
      if (s_.values == GBLM_INT4) {
        to_ = write_nibbles(tile, to_);
        return;
      }
    }
    to_ = write_words(tile, to_);
  }

  // All four bits of every group of columns that holds anything: the others are padding.
  static uint32_t spread(uint32_t mask) {
    uint32_t any = (mask | mask >> 1 | mask >> 2 | mask >> 3) & 0x11111111;
    return any * 15;
  }

  void begin_group(int64_t block) {
    finish_group();
    line_ = to_;
    std::memset(line_, 0, kLine);
    for (int64_t r = 0; r < kRows && first_ + r < s_.rows; r++) {
      const int64_t group = block * kColumns / s_.group;
      const uint16_t scale = s_.scales[(first_ + r) * (s_.columns / s_.group) + group];
      if ((scale & 0x7F80) == 0x7F80 || scale >> 15) good_ = false;
      std::memcpy(line_ + 2 * r, &scale, 2);
    }
    to_ += kLine;
  }

  void finish_group() {
    if (line_ == nullptr) return;
    for (int64_t r = 0; r < kRows; r++) {
      const int16_t sum = static_cast<int16_t>(sums_[r]);
      std::memcpy(line_ + 32 + 2 * r, &sum, 2);
      sums_[r] = 0;
    }
  }

  const gblm_source& s_;
  const Shape& shape_;
  int64_t first_;
  uint8_t* to_;
  uint8_t* line_ = nullptr;
  bool good_ = true;
  Cursor cursors_[kRows] = {};
  int32_t sums_[kRows] = {};
};

struct Preparation {
  const gblm_source& source;
  const Shape& shape;
  uint64_t* offsets;
  uint8_t* base;
  std::atomic<bool> good{true};
};

void measure_task(void* context, int64_t panel) {
  Preparation& p = *static_cast<Preparation*>(context);
  for (int64_t row = panel * kRows; row < smaller((panel + 1) * kRows, p.source.rows); row++)
    if (!check_row(p.source, row)) p.good = false;
  p.offsets[panel + 1] =
      static_cast<uint64_t>(round_up(measure_panel(p.source, p.shape, panel), kLine));
}

void write_task(void* context, int64_t panel) {
  Preparation& p = *static_cast<Preparation*>(context);
  uint8_t* end = Writer(p.source, p.shape, panel, p.base + p.offsets[panel]).write();
  if (end == nullptr) {
    p.good = false;
    return;
  }
  std::memset(end, 0, static_cast<size_t>(p.base + p.offsets[panel + 1] - end));
}

void run(const gblm_pool* pool, int64_t tasks, void (*task)(void*, int64_t), void* context) {
  if (pool != nullptr)
    pool->run(pool->self, tasks, task, context);
  else
    for (int64_t i = 0; i < tasks; i++) task(context, i);
}

// Check the source and find where each panel goes; offsets [panels + 1].
int measure(const gblm_source* source, const gblm_pool* pool, Shape* shape,
            std::vector<uint64_t>* offsets) {
  if (source == nullptr || !check_shape(*source, shape)) return GBLM_BAD_ARGUMENT;
  try {
    offsets->resize(static_cast<size_t>(shape->panels + 1));
  } catch (const std::bad_alloc&) {
    return GBLM_NO_MEMORY;
  }
  (*offsets)[0] = static_cast<uint64_t>(first_panel(shape->panels));
  Preparation job{*source, *shape, offsets->data(), nullptr};
  run(pool, shape->panels, measure_task, &job);
  if (!job.good) return GBLM_BAD_SOURCE;
  for (size_t i = 1; i < offsets->size(); i++) (*offsets)[i] += (*offsets)[i - 1];
  return GBLM_OK;
}

}  // namespace

extern "C" {

int gblm_panels_bytes(const gblm_source* source, const gblm_pool* pool, int64_t* bytes) {
  Shape shape;
  std::vector<uint64_t> offsets;
  if (bytes == nullptr) return GBLM_BAD_ARGUMENT;
  const int result = measure(source, pool, &shape, &offsets);
  if (result == GBLM_OK) *bytes = static_cast<int64_t>(offsets.back()) + kSlack;
  return result;
}

int gblm_prepare(const gblm_source* source, const gblm_pool* pool, void* memory, int64_t bytes) {
  Shape shape;
  std::vector<uint64_t> offsets;
  if (memory == nullptr || reinterpret_cast<uintptr_t>(memory) % kLine) return GBLM_BAD_ARGUMENT;
  if (const int result = measure(source, pool, &shape, &offsets)) return result;
  if (static_cast<int64_t>(offsets.back()) + kSlack != bytes) return GBLM_BAD_ARGUMENT;
  auto* base = static_cast<uint8_t*>(memory);
  Header header{kMagic,          kVersion,     source->rows,
                source->columns, shape.group,  bytes,
                source->values,  source->mask, {}};
  std::memcpy(base, &header, sizeof header);
  std::memcpy(base + kLine, offsets.data(), offsets.size() * 8);
  const int64_t used = kLine + 8 * static_cast<int64_t>(offsets.size());
  std::memset(base + used, 0, static_cast<size_t>(static_cast<int64_t>(offsets[0]) - used));
  std::memset(base + bytes - kSlack, 0, kSlack);
  Preparation job{*source, shape, offsets.data(), base};
  run(pool, shape.panels, write_task, &job);
  return job.good ? GBLM_OK : GBLM_BAD_SOURCE;
}

}  // extern "C"
