// How fast memory is read, which is the limit of decoding.
#include <chrono>

#include "panels.h"

namespace {

constexpr int64_t kPiece = int64_t{1} << 20;

struct Read {
  const uint8_t* memory;
  int64_t bytes;
};

// As the kernels do, whichever way this machine reads fastest.
inline void ask_ahead(const uint8_t* at) {
  if (kOnZen)
    __builtin_prefetch(at + 8192, 0, 0);
  else
    __builtin_prefetch(at + 2048, 0, 2);
}

void read_piece(void* context, int64_t index) {
  const Read& read = *static_cast<const Read*>(context);
  const uint8_t* at = read.memory + index * kPiece;
  const uint8_t* end = at + smaller(kPiece, read.bytes - index * kPiece);
  uint64_t sums[8] = {};
  for (; at + kLine <= end; at += kLine) {
    ask_ahead(at);
    for (int i = 0; i < 8; i++) sums[i] ^= load<uint64_t>(at + 8 * i);
  }
  uint64_t all = 0;
  for (const uint64_t sum : sums) all ^= sum;
  asm volatile("" : : "r"(all));  // keeps the reads
}

}  // namespace

extern "C" double gblm_read_seconds(const void* memory, int64_t bytes, const gblm_pool* pool) {
  Read read{static_cast<const uint8_t*>(memory), bytes};
  const int64_t pieces = (bytes + kPiece - 1) / kPiece;
  const auto began = std::chrono::steady_clock::now();
  run(pool, pieces, read_piece, &read);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}
