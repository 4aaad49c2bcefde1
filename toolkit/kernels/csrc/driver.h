// Products of weights and activations, shared among the threads of the host.
#pragma once

#include <cstdlib>

#include "isa.h"

// The instruction set in use.
const Isa& isa_in_use();

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

// One weight and the tokens that it meets, of several that are multiplied together.
struct Product {
  Panels panels;
  int64_t tokens;
  Output y;
  int64_t rows = 0;        // where its activations begin, in the words of their source
  bool as_before = false;  // its activations are those of the product before it

  // Set by multiply_all: tokens of a tile and panels of a piece, the first tile and the first
  // piece among those of all products, and the first byte of what it has packed.
  int64_t width = 0, step = 0, tile = 0, piece = 0, packed = 0;
};

// Where activations come from.
struct Source {
  const void* self;
  // Those of some tokens of a product, row after row, until this thread's next call; null when
  // memory is short.
  const void* (*rows)(const void* self, const Product& product, int64_t first, int64_t count);
};

// All products, which have one token at least, in one list of work.
int multiply_all(const Isa& isa, Product* products, int64_t count, const Source& source,
                 const gblm_pool* pool);
