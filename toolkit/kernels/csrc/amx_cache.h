// AMX: many tokens. Two panels are expanded into cache, some columns at a time, and multiplied with
// all tokens from there, while the bytes of the next two are asked for.
#pragma once

#include "amx_tiles.h"

namespace {

constexpr int64_t kCacheBytes = 16384;     // of one expanded panel: two leave room in 48 KB
constexpr int64_t kTogether = 32;          // panels that share some columns of the activations
constexpr int64_t kFewTiles = 8;           // of tokens: memory is waited for less in short pieces
constexpr int64_t kCachedBytes = 7 << 16;  // of activations that stay in cache

// Two panels: how far they are read, and the scales of the last group.
struct Pair {
  const uint8_t *at[2], *line[2];
};

// Some panels and all tokens.
template <class Reader>
class Multiplier {
 public:
  static constexpr bool kFloat = Reader::kWords == 16;

  Multiplier(const Panels& panels, const Activations& activations, const TokenTiles& tiles,
             void* memory)
      : p(panels), x(activations), tokens(tiles) {
    cache_[0] = static_cast<uint8_t*>(memory);
    cache_[1] = cache_[0] + kCacheBytes;
    // A tile of weights may reach half a tile further than they do.
    sums_ = reinterpret_cast<float*>(cache_[1] + kCacheBytes + kTile);
    const int64_t cached = tokens.count <= kFewTiles ? kCacheBytes / 2 : kCacheBytes;
    const int64_t unit = kFloat ? 1 : p.group / kColumns;
    piece_ = cached / (Reader::kWords * kLine) / unit * unit;
    const int64_t fit =
        kCachedBytes / (tokens.count * tokens.step_bytes()) * p.blocks / tokens.steps;
    range_ = fit >= p.blocks ? p.blocks : larger(fit / piece_, int64_t{1}) * piece_;
  }
  static int64_t scratch_bytes(const TokenTiles& tokens) {
    return 2 * kCacheBytes + kTile + kTogether / 2 * tokens.padded() * kSumStride;
  }

  // False when the panels are damaged.
  bool run(int64_t first, int64_t last, Output y) {
    const int64_t together = range_ == p.blocks ? 2 : kTogether;
    for (int64_t panel = first; panel < last; panel += together)
      if (!multiply(panel, smaller(panel + together, last), y)) return false;
    return true;
  }

 private:
  bool multiply(int64_t first, int64_t last, Output y) {
    const int64_t pairs = (last - first + 1) / 2, size = tokens.padded() * 2 * kRows;
    std::memset(sums_, 0, static_cast<size_t>(pairs * size) * sizeof(float));
    Pair panels[kTogether / 2];
    for (int64_t i = 0; i < 2 * pairs; i++) {  // the last one twice if it is alone
      panels[i / 2].at[i % 2] = p.begin(smaller(first + i, last - 1));
      panels[i / 2].line[i % 2] = nullptr;
    }
    for (int64_t block = 0; block < p.blocks; block += range_) {
      const int64_t end = smaller(block + range_, p.blocks);
      for (int64_t i = 0; i < pairs; i++)
        for (int64_t b = block; b < end; b += piece_) {
          const auto& next = panels[b + piece_ < end ? i : (i + 1) % pairs].at;
          if (!columns(b, smaller(piece_, end - b), panels[i], next, sums_ + i * size))
            return false;
        }
    }
    for (int64_t i = 0; i < last - first; i++)
      if (!p.ends(first + i, panels[i / 2].at[i % 2])) return false;
    for (int64_t t = 0; t < x.tokens; t++)
      for (int64_t i = 0; i < pairs; i++)
        store_pair(p, first + 2 * i, last, sums_ + i * size + t * 2 * kRows, y.from(t, p));
    return true;
  }

  // As many lines as so many blocks take, spread over all steps.
  Ahead look_ahead(const uint8_t* const (&next)[2], int64_t blocks, int64_t steps) const {
    const int64_t lines = (p.limit - p.base) / (p.count * p.blocks) * blocks / kLine;
    return {{next[0], next[1]}, lines / ((tokens.count + 1) / 2 * steps) + 1};
  }

  // Some blocks of two panels.
  bool columns(int64_t block, int64_t count, Pair& pair, const uint8_t* const (&next)[2],
               float* sums) {
    if constexpr (kFloat)
      return float_columns(block, count, pair, next, sums);
    else
      return integer_columns(block, count, pair, next, sums);
  }

  bool float_columns(int64_t block, int64_t count, Pair& pair, const uint8_t* const (&next)[2],
                     float* sums) {
    const uint8_t* words[2];
    for (int i = 0; i < 2; i++) {
      const Words w = expand<Reader>(p, pair.at[i], count, cache_[i]);
      words[i] = w.first;
      pair.at[i] = w.next;
      if (w.next == nullptr) return false;
    }
    Ahead ahead = look_ahead(next, count, count);
    const uint8_t* from = static_cast<const uint8_t*>(x.packed) + block * tokens.step_bytes();
    for (int64_t t = 0; t < tokens.count; t += 2) {
      const auto tile = t + 1 < tokens.count ? float_tile<2> : float_tile<1>;
      tile(words, count, from + t * tokens.tile_bytes(), tokens,
           sums + t * tokens.width * 2 * kRows, ahead);
    }
    return true;
  }

  bool integer_columns(int64_t block, int64_t count, Pair& pair, const uint8_t* const (&next)[2],
                       float* sums) {
    const int64_t blocks = p.group / kColumns, g = block / blocks, all = p.blocks / blocks;
    Groups groups;
    groups.count = count / blocks;
    groups.steps = TokenTiles::group_steps(p);
    for (int i = 0; i < 2; i++) {
      for (int64_t j = 0; j < groups.count; j++) {
        if (!p.open_group(g + j, &pair.at[i], &pair.line[i])) return false;
        groups.lines[j][i] = pair.line[i];
        const Words w = expand<Reader>(p, pair.at[i], blocks, cache_[i] + j * p.group * kRows);
        groups.words[j][i] = w.first;
        pair.at[i] = w.next;
        if (w.next == nullptr) return false;
      }
    }
    Ahead ahead = look_ahead(next, count, groups.count * groups.steps);
    const uint8_t* from =
        static_cast<const uint8_t*>(x.packed) + g * groups.steps * tokens.step_bytes();
    for (int64_t t = 0; t < tokens.count; t += 2) {
      const auto tile =
          t + 1 < tokens.count ? integer_tile<Reader::kShift, 2> : integer_tile<Reader::kShift, 1>;
      tile(groups, from + t * tokens.tile_bytes(), tokens, x.groups + (t * all + g) * tokens.width,
           all * tokens.width, sums + t * tokens.width * 2 * kRows, ahead);
    }
    return true;
  }

  const Panels& p;
  const Activations& x;
  const TokenTiles& tokens;
  int64_t range_;  // blocks whose activations stay in cache
  int64_t piece_;  // blocks that are expanded at once: whole groups
  uint8_t* cache_[2];
  float* sums_;  // [pair of panels][tokens][2 * 16 rows]
};

}  // namespace
