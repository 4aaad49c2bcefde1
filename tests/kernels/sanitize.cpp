// Feeds the kernels of toolkit/kernels/csrc/ good and damaged input; `make sanitize` builds it with
// the address and undefined-behaviour sanitizers. Exit status 0: every result was as promised.
#include "sanitize.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "sanitize: %s (%s)\n", what, gblm_isa());
  std::exit(1);
}
void expect(bool good, const char* what) {
  if (!good) fail(what);
}

// A thread for each task in turn, as any host may do it.
struct Threads {
  int count;
  static int threads(void* self) { return static_cast<Threads*>(self)->count; }
  static void run(void* self, int64_t tasks, void (*task)(void*, int64_t), void* context) {
    const int64_t count = static_cast<Threads*>(self)->count;
    std::vector<std::thread> workers;
    for (int64_t w = 0; w < count && w < tasks; w++)
      workers.emplace_back([=] {
        for (int64_t i = w; i < tasks; i += count) task(context, i);
      });
    for (std::thread& worker : workers) worker.join();
  }
  gblm_pool pool() { return {this, threads, run}; }
};

// Of exactly its size on the heap, so that the sanitizer sees one byte too far.
struct Memory {
  std::unique_ptr<uint8_t, void (*)(void*)> bytes{nullptr, std::free};
  int64_t size;
  explicit Memory(int64_t size) : size(size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, static_cast<size_t>(size)) != 0) fail("no memory");
    bytes.reset(static_cast<uint8_t*>(memory));
  }
  uint8_t* get() const { return bytes.get(); }
};

Memory prepare(const Weight& w, const gblm_pool* pool) {
  int64_t size = 0;
  expect(gblm_panels_bytes(&w.source, pool, &size) == GBLM_OK, "panels_bytes refused a weight");
  Memory panels(size);
  std::memset(panels.get(), 0xA5, static_cast<size_t>(size));
  expect(gblm_prepare(&w.source, pool, panels.get(), size) == GBLM_OK, "prepare refused a weight");
  return panels;
}

// Returns the result of gblm_unpack; memory is taken as gblm_inspect says.
int unpack(const Memory& panels, std::vector<uint8_t>* values, std::vector<uint8_t>* mask) {
  gblm_info info;
  if (const int result = gblm_inspect(panels.get(), panels.size, &info)) return result;
  expect(info.rows * info.columns <= 16 * panels.size, "panels claim more than they can hold");
  const auto count = static_cast<size_t>(info.rows * info.columns);
  values->resize(count * (info.group ? 1 : 2));
  mask->resize(count);
  std::vector<uint16_t> scales(info.group ? count / static_cast<size_t>(info.group) : 0);
  return gblm_unpack(panels.get(), panels.size, values->data(), mask->data(),
                     info.group ? scales.data() : nullptr);
}

std::vector<uint16_t> activations(int64_t count, Random& r) {
  std::vector<uint16_t> x(static_cast<size_t>(count));
  for (uint16_t& value : x) value = r.bf16();
  return x;
}

uint16_t cut_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}

// Loose: tests/kernels/test_cpu.py has the tight bounds. 1 % covers bf16 and int8 activations.
void compare(const Weight& w, const std::vector<uint16_t>& x, const std::vector<uint16_t>& y) {
  const auto rows = static_cast<size_t>(w.source.rows), k = static_cast<size_t>(w.source.columns);
  for (size_t i = 0; i < y.size(); i++) {
    double want = 0, size = 0;
    for (size_t j = 0; j < k; j++) {
      const double term = from_bf16(x[i / rows * k + j]) * w.dense[i % rows * k + j];
      want += term, size += std::fabs(w.dense[i % rows * k + j]) * 2;
    }
    expect(std::fabs(from_bf16(y[i]) - want) <= 0.01 * size + 1e-30, "a product is wrong");
  }
}

void check_good(const Weight& w, const Memory& panels, Random& r) {
  std::vector<uint8_t> values, mask;
  expect(unpack(panels, &values, &mask) == GBLM_OK, "unpack refused good panels");
  expect(mask == w.mask, "unpack gave another mask");
  for (const int64_t tokens : {0, 1, 2, 3, 5, 7, 11, 16, 17, 37, 99}) {
    const auto x = activations(tokens * w.source.columns, r);
    std::vector<uint16_t> y(static_cast<size_t>(tokens * w.source.rows)), again(y.size());
    Threads four{4};
    const gblm_pool pool = four.pool();
    expect(gblm_linear(panels.get(), panels.size, x.data(), tokens, y.data(), nullptr) == GBLM_OK,
           "linear refused good panels");
    expect(gblm_linear(panels.get(), panels.size, x.data(), tokens, again.data(), &pool) == GBLM_OK,
           "linear refused good panels with threads");
    expect(y == again, "threads change the result");
    compare(w, x, y);
  }
}

// float32 in and out, of activations that are exact in bf16 and of others.
void check_wide(const Weight& w, const Memory& panels, Random& r) {
  for (const int64_t tokens : {0, 1, 2, 9, 17, 99, 300}) {
    const auto halves = activations(tokens * w.source.columns, r);
    std::vector<float> x(halves.size());
    std::vector<float> y(static_cast<size_t>(tokens * w.source.rows)), again(y.size());
    for (size_t i = 0; i < x.size(); i++) x[i] = from_bf16(halves[i]) * (i % 2 ? 1 : 1 + 0x1p-12f);
    Threads four{4};
    const gblm_pool pool = four.pool();
    expect(gblm_linear_f32(panels.get(), panels.size, x.data(), tokens, y.data(), nullptr) ==
                   GBLM_OK &&
               gblm_linear_f32(panels.get(), panels.size, x.data(), tokens, again.data(), &pool) ==
                   GBLM_OK,
           "linear_f32 refused good panels");
    expect(y == again, "threads change the result of linear_f32");
    gblm_gate(y.data(), tokens, w.source.rows / 2, again.data(), nullptr);
    std::vector<uint16_t> rounded(y.size());
    for (size_t i = 0; i < y.size(); i++) rounded[i] = cut_bf16(y[i]);
    compare(w, halves, rounded);
  }
}

// Anything but a crash will do.
void feed(const Memory& panels, Random& r) {
  std::vector<uint8_t> values, mask;
  unpack(panels, &values, &mask);
  gblm_info info;
  if (gblm_inspect(panels.get(), panels.size, &info) != GBLM_OK) return;
  for (const int64_t tokens : {1, 3, 16, 19, 98}) {
    const auto x = activations(tokens * info.columns, r);
    std::vector<uint16_t> y(static_cast<size_t>(tokens * info.rows));
    gblm_linear(panels.get(), panels.size, x.data(), tokens, y.data(), nullptr);
    const std::vector<float> wide(x.size(), 1);
    std::vector<float> sums(y.size());
    gblm_linear_f32(panels.get(), panels.size, wide.data(), tokens, sums.data(), nullptr);
  }
}

void damage(const Memory& good, int rounds, Random& r) {
  for (int round = 0; round < rounds; round++) {
    const int64_t change = r.below(8) == 0 ? r.below(4096) - 2048 : 0;
    Memory bad(good.size + change > 0 ? good.size + change : 1);
    std::memset(bad.get(), 0xFF, static_cast<size_t>(bad.size));
    std::memcpy(bad.get(), good.get(), static_cast<size_t>(std::min(good.size, bad.size)));
    if (change && r.below(2) && bad.size >= 64) std::memcpy(bad.get() + 32, &bad.size, 8);
    // The header and the offsets are few bytes and matter most.
    const int64_t reach = r.below(2) ? bad.size : std::min<int64_t>(bad.size, 192);
    for (int64_t i = r.below(12); i >= 0; i--)
      bad.get()[r.below(reach)] = r.below(3) ? static_cast<uint8_t>(r.next()) : 0xFF;
    if (r.below(6) == 0 && bad.size > 256)  // masks that claim every value
      std::memset(bad.get() + 128, 0xFF, static_cast<size_t>(bad.size - 128));
    feed(bad, r);
  }
}

void damage_source(const Weight& w, int rounds, Random& r) {
  for (int round = 0; round < rounds; round++) {
    Weight bad = w;
    const auto pick = [&r](size_t size) { return static_cast<size_t>(r.below(int64_t(size))); };
    switch (r.below(5)) {
      case 0:
        bad.bitmask[pick(bad.bitmask.size())] ^= static_cast<uint8_t>(1 << r.below(8));
        break;
      case 1:
        bad.starts[pick(bad.starts.size())] =
            r.below(2) ? INT64_MIN : static_cast<int64_t>(r.next());
        break;
      case 2:
        bad.starts[pick(bad.starts.size())] += r.below(5) - 2;
        break;
      case 3:
        bad.source.data_bytes -= r.below(3);
        break;
      default:
        if (!bad.data.empty()) bad.data[pick(bad.data.size())] = 0xFF;
    }
    bad.data.shrink_to_fit();
    bad.source.data = bad.data.data();
    bad.source.bitmask = bad.bitmask.data();
    bad.source.starts = bad.starts.data();
    bad.source.scales = bad.scales.data();
    int64_t size = 0;
    if (gblm_panels_bytes(&bad.source, nullptr, &size) != GBLM_OK) continue;
    Memory panels(size);
    if (gblm_prepare(&bad.source, nullptr, panels.get(), size) == GBLM_OK) feed(panels, r);
  }
}

uint16_t round_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The panels of three experts in one block of exactly their size.
struct Experts {
  static constexpr int64_t kCount = 3;
  int64_t hidden, inner;
  std::vector<Memory> linears;
  std::vector<int64_t> places;
  Memory block{1};

  Experts(int32_t values, int32_t mask, Random& r)
      : hidden(values != GBLM_BF16    ? 64
               : mask == GBLM_8_OF_16 ? 80
                                      : 72),
        inner(hidden + 32) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < 3 * kCount; i++) {
      Weight w;
      const bool down = i % 3 == 2;
      w.fill(down ? hidden : inner, down ? inner : hidden, values, mask,
             values == GBLM_BF16 ? 0 : 32, r);
      linears.push_back(prepare(w, nullptr));
      places.push_back(bytes);
      places.push_back(linears.back().size);
      bytes += linears.back().size;
    }
    block = Memory(bytes);
    for (size_t i = 0; i < linears.size(); i++)
      std::memcpy(block.get() + places[2 * i], linears[i].get(),
                  static_cast<size_t>(linears[i].size));
  }
  gblm_layer layer(const Memory& memory) const {
    return {memory.get(), memory.size, places.data(), kCount, hidden};
  }
  void multiply(int64_t linear, const uint16_t* x, uint16_t* y) const {
    const Memory& panels = linears[static_cast<size_t>(linear)];
    expect(gblm_linear(panels.get(), panels.size, x, 1, y, nullptr) == GBLM_OK,
           "linear refused an expert");
  }
  // What an expert makes of one token.
  std::vector<uint16_t> call(int64_t expert, const uint16_t* x) const {
    std::vector<uint16_t> sides(static_cast<size_t>(2 * inner)), between, y;
    multiply(3 * expert, x, sides.data());
    multiply(3 * expert + 1, x, sides.data() + inner);
    std::vector<float> sums, product(static_cast<size_t>(inner));
    for (const uint16_t side : sides) sums.push_back(from_bf16(side));
    gblm_gate(sums.data(), 1, inner, product.data(), nullptr);
    for (const float value : product) between.push_back(round_bf16(value));
    y.resize(static_cast<size_t>(hidden));
    multiply(3 * expert + 2, between.data(), y.data());
    return y;
  }
  std::vector<uint16_t> add(const std::vector<int32_t>& ids, const uint16_t* x) const {
    std::vector<float> sums(static_cast<size_t>(hidden));
    std::vector<uint16_t> y;
    for (const int32_t id : ids)
      for (size_t i = 0; id >= 0 && i < sums.size(); i++) sums[i] += from_bf16(call(id, x)[i]);
    for (const float sum : sums) y.push_back(round_bf16(sum));
    return y;
  }
};

void check_experts(int32_t values, int32_t mask, Random& r) {
  const Experts experts(values, mask, r);
  const gblm_layer layer = experts.layer(experts.block);
  for (const int64_t tokens : {0, 1, 2, 9, 50, 600}) {
    const auto x = activations(tokens * experts.hidden, r);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < 2 * tokens; i++) ids.push_back(static_cast<int32_t>(r.below(4)) - 1);
    const std::vector<float> shares(ids.size(), 1);
    std::vector<uint16_t> y(x.size()), again(x.size());
    Threads four{4};
    const gblm_pool pool = four.pool();
    expect(gblm_experts(&layer, x.data(), tokens, ids.data(), shares.data(), 2, y.data(),
                        nullptr) == GBLM_OK &&
               gblm_experts(&layer, x.data(), tokens, ids.data(), shares.data(), 2, again.data(),
                            &pool) == GBLM_OK,
           "experts refused a good layer");
    expect(y == again, "threads change the result of experts");
    if (tokens == 1) expect(y == experts.add(ids, x.data()), "experts are not their linears");
    for (const int64_t bad : {Experts::kCount, int64_t{INT32_MAX}}) {
      if (tokens == 0) continue;
      ids.back() = static_cast<int32_t>(bad);
      expect(gblm_experts(&layer, x.data(), tokens, ids.data(), shares.data(), 2, y.data(),
                          nullptr) == GBLM_BAD_ARGUMENT,
             "an expert that is not there was taken");
    }
  }
}

// Anything but a crash will do.
void damage_experts(int32_t values, int32_t mask, int rounds, Random& r) {
  Experts experts(values, mask, r);
  for (int round = 0; round < rounds; round++) {
    Memory bad(experts.block.size);
    std::memcpy(bad.get(), experts.block.get(), static_cast<size_t>(bad.size));
    for (int64_t i = r.below(12); i >= 0; i--)
      bad.get()[r.below(bad.size)] = static_cast<uint8_t>(r.next());
    const std::vector<int64_t> places = experts.places;
    if (r.below(2))
      experts.places[static_cast<size_t>(r.below(18))] =
          r.below(2) ? static_cast<int64_t>(r.next()) : r.below(2 * bad.size);
    const gblm_layer layer = experts.layer(bad);
    const auto x = activations(3 * experts.hidden, r);
    const std::vector<int32_t> ids{0, 1, 2, 0, 1, 2};
    const std::vector<float> shares(6, 1);
    std::vector<uint16_t> y(x.size());
    gblm_experts(&layer, x.data(), 3, ids.data(), shares.data(), 2, y.data(), nullptr);
    experts.places = places;
  }
}

void refuse_arguments(const Weight& w) {
  int64_t size = 0;
  const auto refused = [&](const std::function<void(gblm_source&)>& change) {
    gblm_source bad = w.source;
    change(bad);
    expect(gblm_panels_bytes(&bad, nullptr, &size) != GBLM_OK, "a bad source was taken");
  };
  for (const int64_t number : {int64_t{0}, int64_t{-8}, INT64_MIN, INT64_MAX, int64_t{1} << 40}) {
    refused([=](gblm_source& s) { s.rows = number; });
    refused([=](gblm_source& s) { s.columns = number; });
    refused([=](gblm_source& s) { s.group = number ? number : -1; });
  }
  refused([](gblm_source& s) { s.values = 3; });
  refused([](gblm_source& s) { s.values = -1; });
  refused([](gblm_source& s) { s.mask = 4; });
  refused([](gblm_source& s) { s.starts = nullptr; });
  if (!w.data.empty()) refused([](gblm_source& s) { s.data = nullptr; });
  gblm_info info;
  expect(gblm_panels_bytes(nullptr, nullptr, &size) != GBLM_OK, "no source");
  expect(gblm_inspect(nullptr, 1 << 20, &info) != GBLM_OK, "no panels");
  expect(gblm_use_isa("z80") != GBLM_OK && gblm_use_isa(nullptr) != GBLM_OK, "unknown isa");
}

void run(int32_t values, int32_t mask, uint64_t seed) {
  static const int64_t shapes[][3] = {{1, 32, 32}, {37, 128, 64}, {50, 320, 32}, {16, 2304, 256}};
  Random r{seed};
  for (const auto& [rows, columns, group] : shapes) {
    Weight w;
    // Floats need no whole block of columns.
    const int64_t more = values != GBLM_BF16 ? 0 : mask == GBLM_8_OF_16 ? 16 : 8;
    w.fill(rows, columns + more, values, mask, values == GBLM_BF16 ? 0 : group, r);
    Threads three{3};
    const gblm_pool pool = three.pool();
    const Memory panels = prepare(w, &pool);
    check_good(w, panels, r);
    check_wide(w, panels, r);
    const int rounds = columns > 1000 ? 20 : 150;
    damage(panels, rounds, r);
    damage_source(w, rounds, r);
    refuse_arguments(w);
    expect(gblm_read_seconds(panels.get(), panels.size, &pool) >= 0, "time runs backwards");
  }
}

}  // namespace

int main() {
  for (const char* isa : {"amx", "avx512", "avx2", "neon_bf16", "neon", "portable"}) {
    if (gblm_use_isa(isa) != GBLM_OK) {
      std::printf("sanitize: %s is not available here\n", isa);
      continue;
    }
    for (int32_t values = GBLM_BF16; values <= GBLM_INT4; values++)
      for (int32_t mask = GBLM_DENSE; mask <= GBLM_8_OF_16; mask++) {
        run(values, mask, static_cast<uint64_t>(10 * values + mask));
        Random r{static_cast<uint64_t>(values + 10 * mask)};
        check_experts(values, mask, r);
        damage_experts(values, mask, 100, r);
      }
    std::printf("sanitize: %s is clean\n", isa);
  }
  return 0;
}
