// Instruction sets of arm64 against the portable kernels, for `make arm64`; arguments: those that
// this CPU must have, the one that is chosen first. Integers are equal bit for bit, floats within
// the bound of tests/cpu_cases.py. What is read and written ends where memory ends.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "sanitize.h"

namespace {

constexpr int64_t kMost = 65;  // tokens
constexpr int64_t kTokens[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11,
                               12, 13, 14, 15, 16, 17, 18, 19, 20, 33, kMost};

void expect(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "arm64_check: %s (%s)\n", what.c_str(), gblm_isa());
  std::exit(1);
}

// So many values before a page that nobody may touch.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : bytes_(count * static_cast<int64_t>(sizeof(T))) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    whole_ = static_cast<size_t>((bytes_ + page - 1) / page * page + page);
    void* memory =
        mmap(nullptr, whole_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    expect(memory != MAP_FAILED, "no memory");
    memory_ = static_cast<uint8_t*>(memory);
    const auto end = whole_ - static_cast<size_t>(page);
    expect(mprotect(memory_ + end, static_cast<size_t>(page), PROT_NONE) == 0, "no guard");
    data_ = reinterpret_cast<T*>(memory_ + end - bytes_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, whole_); }

  T* get() const { return data_; }
  int64_t bytes() const { return bytes_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t bytes_;
  size_t whole_;
  uint8_t* memory_;
  T* data_;
};

float widen(float x) { return x; }
float widen(uint16_t x) { return from_bf16(x); }

int multiply(const Guarded<uint8_t>& panels, const uint16_t* x, int64_t tokens, uint16_t* y) {
  return gblm_linear(panels.get(), panels.bytes(), x, tokens, y, nullptr);
}
int multiply(const Guarded<uint8_t>& panels, const float* x, int64_t tokens, float* y) {
  return gblm_linear_f32(panels.get(), panels.bytes(), x, tokens, y, nullptr);
}

void set(uint16_t& x, uint16_t value) { x = value; }
void set(float& x, uint16_t value) { x = from_bf16(value) * (1 + 0x1p-12f); }

// Token 3 is zero, and of integers token 5 has an infinity and token 6 a NaN.
template <class X>
void fill(X* x, int64_t tokens, const gblm_source& source, Random& r) {
  for (int64_t i = 0; i < tokens * source.columns; i++)
    set(x[i], i / source.columns == 3 ? uint16_t{0} : r.bf16());
  if (source.values == GBLM_BF16) return;
  x[5 * source.columns] = static_cast<X>(sizeof(X) == 2 ? 0x7F80 : INFINITY);
  x[6 * source.columns + 1] = static_cast<X>(sizeof(X) == 2 ? 0x7FC0 : NAN);
}

// float64, and how far a result may be from it.
struct Expected {
  std::vector<double> want, bound;
};

template <class X>
Expected expect_floats(const Weight& w, const X* x) {
  const int64_t rows = w.source.rows, columns = w.source.columns;
  Expected found;
  for (int64_t i = 0; i < kMost * rows; i++) {
    double sum = 0, size = 0;
    for (int64_t k = 0; k < columns; k++) {
      const double term = double{widen(x[i / rows * columns + k])} *
                          w.dense[static_cast<size_t>(i % rows * columns + k)];
      sum += term, size += std::fabs(term);
    }
    const double error = static_cast<double>(columns + 8) * 0x1p-24 * size + 0x1p-100;
    found.want.push_back(sum);
    found.bound.push_back(sizeof(X) == 2 ? error + 0x1p-8 * (std::fabs(sum) + error) : error);
  }
  return found;
}

template <class X>
bool same(X a, X b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(widen(a)) && std::isnan(widen(b)));
}

// Results for so many tokens; `portable` has those of all.
template <class X>
void compare(const Weight& w, const Expected& expected, const X* portable, const X* y,
             int64_t tokens) {
  for (int64_t i = 0; i < tokens * w.source.rows; i++) {
    const std::string where = "values " + std::to_string(w.source.values) + ", mask " +
                              std::to_string(w.source.mask) + ", " + std::to_string(tokens) +
                              " tokens: result " + std::to_string(i);
    if (w.source.values != GBLM_BF16) {
      expect(same(portable[i], y[i]), where + " is not the portable one");
      continue;
    }
    const auto at = static_cast<size_t>(i);
    expect(std::fabs(widen(y[i]) - expected.want[at]) <= expected.bound[at], where + " is far off");
  }
}

template <class X>
void check(const Weight& w, const Guarded<uint8_t>& panels, const std::vector<const char*>& isas,
           Random& r) {
  const int64_t rows = w.source.rows, columns = w.source.columns;
  Guarded<X> all(kMost * columns), portable(kMost * rows);
  fill(all.get(), kMost, w.source, r);
  expect(gblm_use_isa("portable") == GBLM_OK, "no portable kernels");
  expect(multiply(panels, all.get(), kMost, portable.get()) == GBLM_OK, "panels are refused");
  Expected expected;
  if (w.source.values == GBLM_BF16) expected = expect_floats(w, all.get());
  for (const char* isa : isas) {
    expect(gblm_use_isa(isa) == GBLM_OK, std::string("no ") + isa);
    for (const int64_t tokens : kTokens) {
      // Others run the portable code: whether they do is soon seen.
      if (w.source.mask < GBLM_4_OF_8 && tokens > 6) continue;
      const Guarded<X> x(tokens * columns), y(tokens * rows);
      std::memcpy(x.get(), all.get(), static_cast<size_t>(x.bytes()));
      expect(multiply(panels, x.get(), tokens, y.get()) == GBLM_OK, "panels are refused");
      compare(w, expected, portable.get(), y.get(), tokens);
    }
  }
}

void check(int32_t values, int32_t mask, const std::vector<const char*>& isas) {
  // Groups of 512 are cut, those of 96 and 160 are not.
  static const int64_t shapes[][3] = {{1, 32, 32}, {37, 96, 96}, {19, 480, 160}, {16, 512, 512}};
  Random r{static_cast<uint64_t>(10 * values + mask)};
  for (const auto& [rows, columns, group] : shapes) {
    Weight w;
    const int64_t more = values != GBLM_BF16 ? 0 : mask == GBLM_8_OF_16 ? 16 : 8;
    w.fill(rows, columns + more, values, mask, values == GBLM_BF16 ? 0 : group, r);
    int64_t size = 0;
    expect(gblm_panels_bytes(&w.source, nullptr, &size) == GBLM_OK, "a weight is refused");
    const Guarded<uint8_t> panels(size), aligned((size + 63) / 64 * 64);
    expect(gblm_prepare(&w.source, nullptr, aligned.get(), size) == GBLM_OK, "a weight is refused");
    std::memcpy(panels.get(), aligned.get(), static_cast<size_t>(size));
    check<uint16_t>(w, panels, isas, r);
    check<float>(w, panels, isas, r);
  }
}

}  // namespace

int main(int count, char** names) {
  const std::vector<const char*> isas(names + 1, names + count);
  expect(!isas.empty() && std::strcmp(gblm_isa(), isas[0]) == 0, "another set is chosen");
  for (int32_t values = GBLM_BF16; values <= GBLM_INT4; values++)
    for (int32_t mask = GBLM_DENSE; mask <= GBLM_8_OF_16; mask++) check(values, mask, isas);
  for (const char* isa : isas) std::printf("arm64_check: %s agrees with portable\n", isa);
  return 0;
}
