// Plain C++ for every CPU (arm64 among them): mask bits are walked one by one.
#include <type_traits>

#include "columns.h"

namespace {

template <int Values, int Mask>
struct PortableReader {
  static constexpr bool kWide = Values == GBLM_BF16;
  static constexpr int kPerWord = kWide ? 2 : 4, kWords = kWide ? 16 : 8;
  static constexpr float kScale = 1;

  static uint64_t mask(const uint8_t* at, int word) {
    if (Mask == GBLM_DENSE) return kWide ? 0xFFFFFFFF : ~uint64_t{0};
    return kWide ? load<uint32_t>(at + 4 * word) : load<uint64_t>(at + 8 * word);
  }

  template <class Visit>
  static const uint8_t* block(const uint8_t* at, Visit&& visit) {
    alignas(64) float columns[kColumns][kRows] = {};
    const uint8_t* v = Mask == GBLM_DENSE ? at : at + kMaskBytes;
    const uint8_t* run = v;  // int4: what two words share
    for (int word = 0; word < kWords; word++) {
      float* to = columns[word * kPerWord];
      const uint8_t* from = Values == GBLM_INT4 ? run : v;
      for (uint64_t bits = mask(at, word); bits != 0; bits &= bits - 1, from += kWide ? 2 : 1) {
        const unsigned lane = static_cast<unsigned>(__builtin_ctzll(bits));
        to[lane % kPerWord * kRows + lane / kPerWord] = read_value<Values>(from, word % 2 * 4);
      }
      v = word % 2 == 1 && Values == GBLM_INT4 ? larger(v, from) : from;
      if (word % 2 == 1) run = v;
    }
    for (int column = 0; column < kColumns; column++) visit(column, load<Lanes>(columns[column]));
    return v;
  }
};

template <int Values, int Mask>
using Reader =
    std::conditional_t<has_planes(Mask), PlaneReader<Values, Mask>, PortableReader<Values, Mask>>;
using Engine = Columns<Reader>;

bool always() { return true; }

constexpr Isa kPortableWide = Engine::isa<float>("portable", always, nullptr);

}  // namespace

const Isa kPortable = Engine::isa<uint16_t>("portable", always, &kPortableWide);
