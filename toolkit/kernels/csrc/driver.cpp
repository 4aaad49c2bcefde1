// The choice of the instruction set, and the distribution of products over threads.
#include "driver.h"

#include <atomic>

namespace {

// What is packed at once, unless a single product needs more.
constexpr int64_t kPackedBytes = 8 << 20;

const Isa* const kIsas[] = {
#if defined(__x86_64__)
    &kAmx, &kAvx512, &kAvx2,
#elif defined(__aarch64__)
    &kNeonBf16, &kNeon,
#endif
    &kPortable};

std::atomic<const Isa*> chosen{nullptr};

thread_local Buffer t_scratch, t_packed;

int64_t divide_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// Products first … last - 1, which are packed, then multiplied.
struct Turn {
  const Isa& isa;
  Product* products;
  const Source& source;
  int64_t first, last;
  int64_t tiles, pieces, bytes;
  uint8_t* packed;
  std::atomic<int64_t> next;
  std::atomic<int> result;

  // The product that a tile or a piece is of: the last one that begins with it or before it.
  const Product& find(int64_t Product::* begin, int64_t index) const {
    int64_t low = first, high = last;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (products[middle].*begin <= index ? low : high) = middle;
    }
    return products[low];
  }

  int64_t floats_bytes(const Product& p) const {
    return round_up(isa.packed_bytes(p.panels, p.tokens), kLine);
  }
  int64_t packed_bytes(const Product& p) const {
    const int64_t groups = p.panels.group ? p.panels.columns / p.panels.group : 0;
    const int64_t padded = p.tokens + 64;  // a tile may be wider than its tokens
    return floats_bytes(p) +
           round_up(groups * padded * static_cast<int64_t>(sizeof(Rounding)), kLine);
  }
  void* activations(const Product& p) const { return packed + p.packed; }
  Rounding* rounding(const Product& p) const {
    return reinterpret_cast<Rounding*>(packed + p.packed + floats_bytes(p));
  }

  static bool pack_alike(const Product& a, const Product& b) {
    return a.tokens == b.tokens && a.width == b.width && a.panels.columns == b.panels.columns &&
           a.panels.group == b.panels.group && a.panels.values == b.panels.values &&
           a.panels.mask == b.panels.mask;
  }

  // Take products until memory for what they pack is full.
  void plan(int64_t count, int64_t threads) {
    tiles = pieces = bytes = 0;
    for (last = first; last < count; last++) {
      Product& p = products[last];
      p.width = isa.width(p.panels, p.tokens);
      p.step = isa.panels_per_task(p.panels, p.tokens, threads);
      p.tile = tiles;
      p.piece = pieces;
      if (last > first && p.as_before && pack_alike(p, products[last - 1])) {
        p.packed = products[last - 1].packed;
      } else {
        const int64_t more = packed_bytes(p);
        if (last > first && bytes + more > kPackedBytes) return;
        p.packed = bytes;
        bytes += more;
        tiles += divide_up(p.tokens, p.width);
      }
      pieces += divide_up(p.panels.count, p.step);
    }
  }
};

void pack_tile(void* context, int64_t index) {
  Turn& turn = *static_cast<Turn*>(context);
  const Product& p = turn.find(&Product::tile, index);
  const int64_t tile = index - p.tile, first = tile * p.width;
  const void* rows =
      turn.source.rows(turn.source.self, p, first, smaller(p.width, p.tokens - first));
  if (rows == nullptr)
    turn.result = GBLM_NO_MEMORY;
  else
    turn.isa.pack(p.panels, rows, p.tokens, tile, turn.activations(p), turn.rounding(p));
}

// Panels differ in length, so threads take the next few when they are ready.
void multiply_pieces(void* context, int64_t) {
  Turn& turn = *static_cast<Turn*>(context);
  for (;;) {
    const int64_t piece = turn.next.fetch_add(1, std::memory_order_relaxed);
    if (piece >= turn.pieces) return;
    const Product& p = turn.find(&Product::piece, piece);
    uint8_t* scratch = t_scratch.get(turn.isa.scratch_bytes(p.panels, p.tokens));
    if (scratch == nullptr) {
      turn.result = GBLM_NO_MEMORY;
      return;
    }
    const int64_t first = (piece - p.piece) * p.step;
    const Activations x{turn.activations(p), turn.rounding(p), p.tokens};
    if (!turn.isa.multiply(p.panels, x, first, smaller(first + p.step, p.panels.count), p.y,
                           scratch))
      turn.result = GBLM_BAD_PANELS;
  }
}

}  // namespace

const Isa& isa_in_use() {
  const Isa* found = chosen.load(std::memory_order_acquire);
  if (found == nullptr) {
    for (const Isa* candidate : kIsas)
      if (candidate->supported()) {
        found = candidate;
        break;
      }
    chosen.store(found, std::memory_order_release);
  }
  return *found;
}

int multiply_all(const Isa& isa, Product* products, int64_t count, const Source& source,
                 const gblm_pool* pool) {
  const int64_t threads = pool != nullptr ? pool->threads(pool->self) : 1;
  for (int64_t first = 0; first < count;) {
    Turn turn{isa, products, source, first, first, 0, 0, 0, nullptr, {0}, {GBLM_OK}};
    turn.plan(count, threads);
    turn.packed = t_packed.get(turn.bytes);
    if (turn.packed == nullptr) return GBLM_NO_MEMORY;
    run(pool, turn.tiles, pack_tile, &turn);
    if (turn.result == GBLM_OK) run(pool, smaller(threads, turn.pieces), multiply_pieces, &turn);
    if (turn.result != GBLM_OK) return turn.result;
    first = turn.last;
  }
  return GBLM_OK;
}

extern "C" {

const char* gblm_isa(void) { return isa_in_use().name; }

int gblm_use_isa(const char* name) {
  if (name == nullptr) return GBLM_BAD_ARGUMENT;
  for (const Isa* candidate : kIsas)
    if (std::strcmp(candidate->name, name) == 0 && candidate->supported()) {
      chosen.store(candidate, std::memory_order_release);
      return GBLM_OK;
    }
  return GBLM_BAD_ARGUMENT;
}

}  // extern "C"
