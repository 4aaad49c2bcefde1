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

thread_local Buffer t_scratch, t_packed;

struct Job {
  const Isa& isa;
  const Panels& panels;
  Activations x;
  const uint16_t* source;
  void* packed;
  float* scales;
  uint16_t* y;
  int64_t tiles, step;
  std::atomic<int64_t> next{0};
  std::atomic<int> result{GBLM_OK};
};

void pack_tile(void* context, int64_t tile) {
  Job& job = *static_cast<Job*>(context);
  job.isa.pack(job.panels, job.source, job.x.tokens, tile, job.packed, job.scales);
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

int multiply(const Panels& panels, const uint16_t* x, int64_t tokens, uint16_t* y,
             const gblm_pool* pool) {
  const Isa& with = isa();
  const int64_t packed_bytes = round_up(with.packed_bytes(panels, tokens), kLine);
  const int64_t groups = panels.group ? panels.columns / panels.group : 0;
  const int64_t padded = tokens + 64;  // a tile may be wider than its tokens
  uint8_t* packed = t_packed.get(packed_bytes + groups * padded * 4);
  if (packed == nullptr) return GBLM_NO_MEMORY;
  float* scales = reinterpret_cast<float*>(packed + packed_bytes);
  const int64_t threads = pool != nullptr ? pool->threads(pool->self) : 1;
  const int64_t step = with.panels_per_task(panels, tokens, threads);
  Job job{with,   panels, {packed, scales, tokens},   x,   packed,
          scales, y,      with.tiles(panels, tokens), step};
  run(pool, job.tiles, pack_tile, &job);
  run(pool, smaller(threads, (panels.count + step - 1) / step), multiply_panels, &job);
  return job.result;
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
    const int result = multiply(panels, x + t * panels.columns, now, y + t * panels.rows, pool);
    if (result != GBLM_OK) return result;
  }
  return GBLM_OK;
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
      return "the panels in memory are damaged";
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
