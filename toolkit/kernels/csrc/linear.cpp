// The C ABI of multiplying: checks, choice of the instruction set, distribution over threads.
#include <atomic>
#include <cstdlib>

#include "isa.h"

namespace {

// More tokens are taken in turns: bounds the scratch memory, and costs 1 % of expanding again.
constexpr int64_t kMaxTokens = 512;

const Isa* const kIsas[] = {
#if defined(__x86_64__)
    &kAmx, &kAvx512, &kAvx2,
#elif defined(__aarch64__)
    &kNeonBf16, &kNeon,
#endif
    &kPortable};

std::atomic<const Isa*> chosen{nullptr};

const Isa& isa() {
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

// Memory that a thread keeps for its next call.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  uint8_t* get(int64_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      memory_ = std::aligned_alloc(4096, static_cast<size_t>(round_up(bytes, 4096)));
      if (memory_ != nullptr) bytes_ = bytes;
    }
    return static_cast<uint8_t*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

thread_local Buffer t_scratch, t_packed, t_terms;

struct Job {
  const Isa& isa;
  const Panels& panels;
  Activations x;
  const void* source;
  void* packed;
  Rounding* groups;
  Output y;
  int64_t tiles, step;
  std::atomic<int64_t> next{0};
  std::atomic<int> result{GBLM_OK};
};

void pack_tile(void* context, int64_t tile) {
  Job& job = *static_cast<Job*>(context);
  job.isa.pack(job.panels, job.source, job.x.tokens, tile, job.packed, job.groups);
}

// Panels differ in length, so threads take the next few when they are ready.
void multiply_panels(void* context, int64_t) {
  Job& job = *static_cast<Job*>(context);
  uint8_t* scratch = t_scratch.get(job.isa.scratch_bytes(job.panels, job.x.tokens));
  if (scratch == nullptr) {
    job.result = GBLM_NO_MEMORY;
    return;
  }
  for (;;) {
    const int64_t first = job.next.fetch_add(job.step, std::memory_order_relaxed);
    if (first >= job.panels.count) return;
    const int64_t last = smaller(first + job.step, job.panels.count);
    if (!job.isa.multiply(job.panels, job.x, first, last, job.y, scratch))
      job.result = GBLM_BAD_PANELS;
  }
}

int multiply(const Isa& with, const Panels& panels, const void* x, int64_t tokens, Output y,
             const gblm_pool* pool) {
  const int64_t packed_bytes = round_up(with.packed_bytes(panels, tokens), kLine);
  const int64_t groups = panels.group ? panels.columns / panels.group : 0;
  const int64_t padded = tokens + 64;  // a tile may be wider than its tokens
  uint8_t* packed =
      t_packed.get(packed_bytes + groups * padded * static_cast<int64_t>(sizeof(Rounding)));
  if (packed == nullptr) return GBLM_NO_MEMORY;
  Rounding* rounding = reinterpret_cast<Rounding*>(packed + packed_bytes);
  const int64_t threads = pool != nullptr ? pool->threads(pool->self) : 1;
  const int64_t step = with.panels_per_task(panels, tokens, threads);
  Job job{with,     panels, {packed, rounding, tokens}, x,   packed,
          rounding, y,      with.tiles(panels, tokens), step};
  run(pool, job.tiles, pack_tile, &job);
  run(pool, smaller(threads, (panels.count + step - 1) / step), multiply_panels, &job);
  return job.result;
}

// float32 activations as bf16 rows [tokens * terms, columns]: rounded, then what that left out.
struct Split {
  const float* x;
  uint16_t* rows;
  int64_t columns, terms;
};

void split_token(void* context, int64_t token) {
  const Split& split = *static_cast<const Split*>(context);
  const float* x = split.x + token * split.columns;
  uint16_t* high = split.rows + token * split.terms * split.columns;
  if (split.terms == 1) {
    for (int64_t k = 0; k < split.columns; k++) high[k] = to_bf16(x[k]);
    return;
  }
  uint16_t* low = high + split.columns;
  for (int64_t k = 0; k < split.columns; k++) {
    const uint32_t bits = load<uint32_t>(x + k);
    const bool finite = (bits & 0x7F800000) != 0x7F800000;
    // Cut where rounding would give infinity.
    const bool huge = (bits & 0x7FFFFFFF) >= 0x7F7F8000;
    high[k] = finite && huge ? static_cast<uint16_t>(bits >> 16) : to_bf16(x[k]);
    low[k] = finite ? to_bf16(x[k] - from_bf16(high[k])) : uint16_t{0};
  }
}

struct Add {
  const float* sums;  // [tokens * 2, rows]
  float* y;
  int64_t rows;
};

void add_terms(void* context, int64_t token) {
  const Add& add = *static_cast<const Add*>(context);
  const float* high = add.sums + token * 2 * add.rows;
  float* y = add.y + token * add.rows;
  for (int64_t r = 0; r < add.rows; r++) y[r] = high[r] + high[add.rows + r];
}

struct Gating {
  const float* sums;
  float* y;
  int64_t features;
};

void gate_one(void* context, int64_t token) {
  const Gating& g = *static_cast<const Gating*>(context);
  isa().gate(g.sums + token * 2 * g.features, g.features, g.y + token * g.features);
}

int multiply_wide(const Panels& panels, const float* x, int64_t tokens, float* y,
                  const gblm_pool* pool) {
  const Isa& with = isa();
  if (panels.group == 0 && with.wide != nullptr)
    return multiply(*with.wide, panels, x, tokens, Output{nullptr, y}, pool);
  // Integer weights round activations to int8: a second term would change nothing.
  const int64_t terms = panels.group ? 1 : 2;
  const int64_t split_bytes = round_up(tokens * terms * panels.columns * 2, kLine);
  const int64_t sum_bytes = terms == 2 ? tokens * 2 * panels.rows * 4 : 0;
  uint8_t* memory = t_terms.get(split_bytes + sum_bytes);
  if (memory == nullptr) return GBLM_NO_MEMORY;
  Split split{x, reinterpret_cast<uint16_t*>(memory), panels.columns, terms};
  run(pool, tokens, split_token, &split);
  float* sums = terms == 2 ? reinterpret_cast<float*>(memory + split_bytes) : y;
  const int result =
      multiply(with, panels, split.rows, tokens * terms, Output{nullptr, sums}, pool);
  if (result != GBLM_OK || terms == 1) return result;
  Add add{sums, y, panels.rows};
  run(pool, tokens, add_terms, &add);
  return GBLM_OK;
}

}  // namespace

extern "C" {

int gblm_linear(const void* memory, int64_t bytes, const uint16_t* x, int64_t tokens, uint16_t* y,
                const gblm_pool* pool) {
  Panels panels;
  if (const int result = open_panels(memory, bytes, &panels)) return result;
  if (tokens < 0 || (tokens > 0 && (x == nullptr || y == nullptr))) return GBLM_BAD_ARGUMENT;
  for (int64_t t = 0; t < tokens; t += kMaxTokens) {
    const int64_t now = smaller(kMaxTokens, tokens - t);
    const Output rows{y + t * panels.rows, nullptr};
    const int result = multiply(isa(), panels, x + t * panels.columns, now, rows, pool);
    if (result != GBLM_OK) return result;
  }
  return GBLM_OK;
}

int gblm_linear_f32(const void* memory, int64_t bytes, const float* x, int64_t tokens, float* y,
                    const gblm_pool* pool) {
  Panels panels;
  if (const int result = open_panels(memory, bytes, &panels)) return result;
  if (tokens < 0 || (tokens > 0 && (x == nullptr || y == nullptr))) return GBLM_BAD_ARGUMENT;
  constexpr int64_t together = kMaxTokens / 2;
  for (int64_t t = 0; t < tokens; t += together) {
    const int64_t now = smaller(together, tokens - t);
    const int result =
        multiply_wide(panels, x + t * panels.columns, now, y + t * panels.rows, pool);
    if (result != GBLM_OK) return result;
  }
  return GBLM_OK;
}

void gblm_gate(const float* sums, int64_t tokens, int64_t features, float* y,
               const gblm_pool* pool) {
  Gating gating{sums, y, features};
  run(pool, tokens, gate_one, &gating);
}

const char* gblm_isa(void) { return isa().name; }

int gblm_use_isa(const char* name) {
  if (name == nullptr) return GBLM_BAD_ARGUMENT;
  for (const Isa* candidate : kIsas)
    if (std::strcmp(candidate->name, name) == 0 && candidate->supported()) {
      chosen.store(candidate, std::memory_order_release);
      return GBLM_OK;
    }
  return GBLM_BAD_ARGUMENT;
}

const char* gblm_error(int result) {
  switch (result) {
    case GBLM_OK:
      return "no error";
    case GBLM_BAD_ARGUMENT:
      return "an argument is out of range";
    case GBLM_BAD_PANELS:
      return "the panels are damaged, or another version of gblm made them";
    case GBLM_BAD_SOURCE:
      return "masks, offsets and values of the weight do not agree";
    case GBLM_NO_MEMORY:
      return "out of memory";
    default:
      return "unknown error";
  }
}

const char* gblm_compiler(void) {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}

}  // extern "C"
