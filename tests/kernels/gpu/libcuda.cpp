// The few functions of the CUDA driver that gblm calls, and a GPU for them on one CPU core.
//
// An "image" is the path of a library that was built from a kernel's source behind emulator.h.
// Every thread of a block is a fiber; which one runs next is drawn from a seed, so that results
// which depend on an order show. Each access to memory is checked against the buffers that the
// launch was given.

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace emulator {
using uintptr = unsigned long;
constexpr int kStack = 64 << 10, kMaxShared = 227 << 10;

struct Place {
  unsigned x;
};
struct Warp {
  int arrived;
  unsigned turn;
  unsigned a[32][4], b[32][4], meta[32];
  float value[32];
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  Place thread;
  bool done;
  const unsigned* waits;  // until this counter leaves this value
  unsigned seen;
};
struct Buffer {
  uintptr begin, end;
  bool writable;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Buffer> buffers;
ucontext_t scheduler;
Fiber* current;
int arrived;
unsigned turn, seed;
Place block, grid;
alignas(16) char memory[kMaxShared];
std::string error;
void (*body)(void**);
void** arguments;

Place& thread_index() { return current->thread; }
Place& block_index() { return block; }
Place& grid_size() { return grid; }
Warp& warp() { return warps[current->thread.x / 32]; }
char* shared() { return memory; }

void fail(const char* what, int detail) {
  if (error.empty())
    error = "block " + std::to_string(block.x) + ": " + what + " (" + std::to_string(detail) + ")";
}

bool may_access(uintptr at, int bytes, bool write) {
  if (at % bytes) return fail("an address is no multiple of the access's bytes", bytes), false;
  for (const Buffer& buffer : buffers)
    if (at >= buffer.begin && at + bytes <= buffer.end && (!write || buffer.writable)) return true;
  return fail(write ? "a write out of bounds" : "a read out of bounds", bytes), false;
}

// Sleep until everybody who counts has arrived.
void meet(int& count, unsigned& counter, int all) {
  if (++count == all) {
    count = 0;
    counter++;
    return;
  }
  current->waits = &counter;
  current->seen = counter;
  swapcontext(&current->context, &scheduler);
}

void meet_block() { meet(arrived, turn, fibers.size()); }
void meet_warp() { meet(warp().arrived, warp().turn, 32); }

void enter() {
  body(arguments);
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

void run_fibers(std::mt19937& order) {
  std::vector<Fiber*> ready;
  for (;;) {
    bool alive = false;
    ready.clear();
    for (Fiber& fiber : fibers) {
      alive |= !fiber.done;
      if (!fiber.done && (!fiber.waits || *fiber.waits != fiber.seen)) ready.push_back(&fiber);
    }
    if (!alive) return;
    if (ready.empty()) return fail("threads wait for others that never come", 0);
    std::shuffle(ready.begin(), ready.end(), order);
    for (Fiber* fiber : ready) {
      current = fiber;
      fiber->waits = nullptr;
      swapcontext(&scheduler, &fiber->context);
    }
  }
}

void run_block(unsigned shared_bytes, std::mt19937& order) {
  for (unsigned i = 0; i < fibers.size(); i++) {
    Fiber& fiber = fibers[i];
    fiber.thread = {i};
    fiber.done = false;
    fiber.waits = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  // Bits of a NaN: what a kernel reads and did not write shows.
  memset(memory, 0xFF, sizeof memory);
  run_fibers(order);
  for (int i = shared_bytes; i < kMaxShared; i++)
    if (memory[i] != (char)0xFF) return fail("a write behind the shared memory", i);
}

int run(unsigned blocks, unsigned threads, unsigned shared_bytes, void (*kernel)(void**),
        void** values) {
  std::mt19937 order(seed);
  error.clear();
  body = kernel;
  arguments = values;
  grid = {blocks};
  fibers.resize(threads);
  for (block.x = 0; block.x < blocks && error.empty(); block.x++) {
    warps.assign((threads + 31) / 32, Warp());
    arrived = 0;
    run_block(shared_bytes, order);
  }
  return !error.empty();
}
}  // namespace emulator

namespace {
using Kernel = int (*)(unsigned, unsigned, unsigned, void**);
unsigned allowed_shared = 48 << 10;
constexpr int kInvalidValue = 1, kInvalidImage = 200, kNotFound = 500, kLaunchFailed = 719;
}  // namespace

extern "C" {
int cuInit(unsigned) { return 0; }

int cuModuleLoadData(void** module, const void* image) {
  *module = dlopen((const char*)image, RTLD_NOW | RTLD_LOCAL);
  if (!*module) emulator::error = dlerror();
  return *module ? 0 : kInvalidImage;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = dlsym(module, ("emulate_" + std::string(name)).c_str());
  if (!*function) emulator::error = "no such kernel";
  return *function ? 0 : kNotFound;
}

int cuFuncSetAttribute(void*, int attribute, int value) {
  if (attribute != 8 || value > emulator::kMaxShared) return kInvalidValue;
  allowed_shared = value;
  return 0;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, void*,
                   void** values, void** extra) {
  const bool flat = grid_y == 1 && grid_z == 1 && block_y == 1 && block_z == 1;
  if (!flat || !grid_x || !block_x || block_x > 1024 || extra || shared > allowed_shared) {
    emulator::error = "invalid launch";
    return kInvalidValue;
  }
  return ((Kernel)function)(grid_x, block_x, shared, values) ? kLaunchFailed : 0;
}

int cuGetErrorString(int, const char** text) {
  *text = emulator::error.c_str();
  return 0;
}

void emulator_allow(unsigned long begin, size_t bytes, int writable) {
  emulator::buffers.push_back({begin, begin + bytes, writable != 0});
}
void emulator_forget() { emulator::buffers.clear(); }
void emulator_seed(unsigned value) { emulator::seed = value; }
}
