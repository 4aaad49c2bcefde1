// AVX-512: blocks expanded into cache, and sums on their way back.
#pragma once

#include "avx512_words.h"

namespace {

// Some blocks of a panel as plain words, and where the stream goes on (nullptr: damaged).
struct Words {
  const uint8_t* first;
  const uint8_t* next;
};

template <class Reader>
Words expand(const Panels& p, const uint8_t* at, int64_t blocks, uint8_t* cache) {
  const uint8_t* first = Reader::kInPlace ? at : cache;
  for (int64_t b = 0; b < blocks; b++) {
    if (at > p.limit) return {first, nullptr};
    at = Reader::block(at, [&](auto w, __m512i word) LAMBDA {
      if constexpr (!Reader::kInPlace) _mm512_store_si512(cache + kLine * w, word);
    });
    cache += kLine * Reader::kWords;
  }
  return {first, at};
}

INLINE void store_rows(const Panels& p, int64_t panel, __m512 sums, Output y) {
  const int64_t left = p.rows - panel * kRows;
  const __mmask16 rows = left >= kRows ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
  if (y.wide != nullptr)
    _mm512_mask_storeu_ps(y.wide + panel * kRows, rows, sums);
  else
    _mm256_mask_storeu_epi16(y.rounded + panel * kRows, rows, (__m256i)_mm512_cvtneps_pbh(sums));
}

}  // namespace
