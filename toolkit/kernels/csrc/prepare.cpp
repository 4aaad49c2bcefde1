// Disk layout to panels. Plain C++: it runs once, at load, and every CPU can do it.
#include <atomic>
#include <new>
#include <vector>

#include "writer.h"

namespace {

// Long groups are cut; the pieces share their scale.
int64_t panel_group(int64_t group) {
  for (int64_t size = kMaxGroup; size >= kColumns; size -= kColumns)
    if (group % size == 0) return size;
  return 0;
}

bool check_shape(const gblm_source& s, Shape* shape) {
  const bool ranges = s.rows > 0 && s.rows <= kMaxExtent && s.columns > 0 &&
                      s.columns <= kMaxExtent && s.columns % 8 == 0 && s.data_bytes >= 0 &&
                      s.values >= GBLM_BF16 && s.values <= GBLM_INT4 && s.mask >= GBLM_DENSE &&
                      s.mask <= GBLM_8_OF_16;
  if (!ranges || (s.data == nullptr && s.data_bytes > 0) || s.starts == nullptr) return false;
  if (s.mask != GBLM_DENSE && s.bitmask == nullptr) return false;
  if (s.mask == GBLM_8_OF_16 && s.columns % 16 != 0) return false;
  *shape = {(s.rows + kRows - 1) / kRows, (s.columns + kColumns - 1) / kColumns, 0, 0};
  if (!is_integer(s.values)) return s.group == 0;
  if (s.scales == nullptr || s.group <= 0 || s.columns % s.group != 0) return false;
  shape->group = panel_group(s.group);
  if (shape->group == 0 || s.columns % kColumns != 0) return false;
  shape->groups = s.columns / shape->group;
  return true;
}

// Bits that are set where the counts of kept weights, in each of eight bytes, break the pattern.
uint64_t wrong_counts(int32_t mask, uint64_t counts, uint64_t inside) {
  if (mask == GBLM_4_OF_8) return counts ^ (kBytes * 4 & inside);
  if (mask != GBLM_8_OF_16) return 0;
  const uint64_t sums = counts + (counts >> 8), pairs = kBytes & 0x00FF00FF00FF00FF;
  const uint64_t few = ~(counts + kBytes * (128 - 3)), many = counts + kBytes * (128 - 6);
  return ((few | many) & kBytes * 128 & inside) | ((sums & pairs * 255) ^ (pairs * 8 & inside));
}

// A row's stored values end where the next row's begin, and there are as many as mask bits.
bool check_row(const gblm_source& s, int64_t row) {
  int64_t kept = 0;
  uint64_t wrong = 0;
  for (int64_t b = 0; b < s.columns / 8; b += 8) {
    const uint64_t counts = count_bytes(count_nibbles(count_pairs(row_bits(s, row, b))));
    wrong |= wrong_counts(s.mask, counts, whole_bytes(s, b));
    kept += sum_bytes(counts);
  }
  const int64_t bytes = value_bytes(s.values, s.values == GBLM_INT4 ? kept + 1 : kept);
  const int64_t first = s.starts[row], last = s.starts[row + 1];
  const bool inside = first >= 0 && first <= last && last <= s.data_bytes;
  return wrong == 0 && inside && last - first == bytes;
}

// Bytes of the values of a panel's int4 words, two of which share their bytes: 8 columns.
int64_t measure_nibbles(const gblm_source& s, int64_t panel) {
  constexpr uint64_t low_nibbles = 0x0F0F0F0F0F0F0F0F;
  int64_t total = 0;
  for (int64_t b = 0; b < s.columns / 8; b += 8) {
    uint64_t low = 0, high = 0;  // a count in each byte, at most 64
    for (int64_t r = 0; r < kRows; r++) {
      const uint64_t counts = count_nibbles(count_pairs(row_bits(s, panel * kRows + r, b)));
      low += counts & low_nibbles;
      high += counts >> 4 & low_nibbles;
    }
    for (int shift = 0; shift < 64; shift += 8)
      total += larger<int64_t>(low >> shift & 255, high >> shift & 255);
  }
  return total;
}

// Bytes of a panel: scales, masks and values.
int64_t measure_panel(const gblm_source& s, const Shape& shape, int64_t panel) {
  const int64_t scales = scale_bytes(shape.groups);
  if (s.mask != GBLM_ANY) return scales + shape.blocks * block_size(s.values, s.mask);
  const int64_t masks = shape.blocks * kMaskBytes;
  if (s.values == GBLM_INT4) return scales + masks + measure_nibbles(s, panel);
  int64_t stored = 0;
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t b = 0; b < s.columns / 8; b += 8)
      stored +=
          sum_bytes(count_bytes(count_nibbles(count_pairs(row_bits(s, panel * kRows + r, b)))));
  return scales + masks + value_bytes(s.values, stored);
}

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
  p.offsets[panel + 1] = static_cast<uint64_t>(measure_panel(p.source, p.shape, panel));
}

void write_task(void* context, int64_t panel) {
  Preparation& p = *static_cast<Preparation*>(context);
  uint8_t* to = p.base + p.offsets[panel];
  const uint8_t* end =
      p.source.values == GBLM_BF16   ? Writer<GBLM_BF16>(p.source, p.shape, panel, to).write()
      : p.source.values == GBLM_INT8 ? Writer<GBLM_INT8>(p.source, p.shape, panel, to).write()
                                     : Writer<GBLM_INT4>(p.source, p.shape, panel, to).write();
  if (end != p.base + p.offsets[panel + 1]) p.good = false;
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
  if (result == GBLM_OK) *bytes = static_cast<int64_t>(offsets.back()) + slack(source->values);
  return result;
}

int gblm_prepare(const gblm_source* source, const gblm_pool* pool, void* memory, int64_t bytes) {
  Shape shape;
  std::vector<uint64_t> offsets;
  if (memory == nullptr || reinterpret_cast<uintptr_t>(memory) % kLine) return GBLM_BAD_ARGUMENT;
  if (const int result = measure(source, pool, &shape, &offsets)) return result;
  if (static_cast<int64_t>(offsets.back()) + slack(source->values) != bytes)
    return GBLM_BAD_ARGUMENT;
  auto* base = static_cast<uint8_t*>(memory);
  Header header{kMagic,          kVersion,     source->rows,
                source->columns, shape.group,  bytes,
                source->values,  source->mask, {}};
  std::memcpy(base, &header, sizeof header);
  std::memcpy(base + kLine, offsets.data(), offsets.size() * 8);
  const int64_t used = kLine + 8 * static_cast<int64_t>(offsets.size());
  std::memset(base + used, 0, static_cast<size_t>(static_cast<int64_t>(offsets[0]) - used));
  const int64_t rest = slack(source->values);
  std::memset(base + bytes - rest, 0, static_cast<size_t>(rest));
  Preparation job{*source, shape, offsets.data(), base};
  run(pool, shape.panels, write_task, &job);
  return job.good ? GBLM_OK : GBLM_BAD_SOURCE;
}

}  // extern "C"
