// The C ABI of a mixture of experts: pairs of a token and an expert are sorted by expert, and the
// weights of all chosen experts become one list of work.
#include "driver.h"

namespace {

// More tokens are taken in turns: bounds what lies between the linears.
constexpr int64_t kMaxTokens = 512;
// Results of a token that a task adds up.
constexpr int64_t kSumColumns = 512;

thread_local Buffer t_lists, t_values, t_rows;

// Parts of a memory, one behind the other; without memory they are counted.
class Parts {
 public:
  explicit Parts(const uint8_t* memory) : begin_(reinterpret_cast<uintptr_t>(memory)) {}
  template <class T>
  void take(int64_t count, T** part) {
    *part = reinterpret_cast<T*>(begin_ + static_cast<uintptr_t>(bytes_));
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), kLine);
  }
  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t begin_;
  int64_t bytes_ = 0;
};

// Some tokens on their way through the experts. Pairs are numbered expert by expert.
struct Call {
  const Isa& isa;
  const gblm_layer& layer;
  const uint16_t* x;
  int64_t tokens;
  const int32_t* ids;
  const float* shares;
  int64_t chosen;
  uint16_t* y;

  // Placed by lay_out_lists: the first pair of each expert; the pairs' tokens, and the tokens'
  // pairs, -1 where there is none; gate and up of every chosen expert, and down.
  int64_t *starts = nullptr, *next = nullptr;
  int32_t *token_of = nullptr, *pair_of = nullptr;
  Product *inner = nullptr, *downs = nullptr;
  // Placed by lay_out_values: what gate, up and down give for each pair.
  uint16_t *gates = nullptr, *ups = nullptr, *results = nullptr;

  int64_t most_pairs() const { return tokens * chosen; }
  void lay_out_lists(Parts& parts) {
    parts.take(layer.experts + 1, &starts);
    parts.take(layer.experts + 1, &next);
    parts.take(most_pairs(), &token_of);
    parts.take(most_pairs(), &pair_of);
    const int64_t most = smaller(layer.experts, most_pairs());
    parts.take(2 * most, &inner);
    parts.take(most, &downs);
  }
  void lay_out_values(Parts& parts, int64_t pairs, int64_t widest) {
    parts.take(pairs * widest, &gates);
    parts.take(pairs * widest, &ups);
    parts.take(pairs * layer.columns, &results);
  }
};

// Let `lay_out` place its parts in memory that this thread keeps; false when it is short.
template <class LayOut>
bool allocate(Buffer& buffer, LayOut&& lay_out) {
  Parts counted(nullptr);
  lay_out(counted);
  uint8_t* memory = buffer.get(larger(counted.bytes(), kLine));
  if (memory == nullptr) return false;
  Parts placed(memory);
  lay_out(placed);
  return true;
}

// Returns the number of pairs.
int64_t sort_pairs(Call& call) {
  const int64_t experts = call.layer.experts;
  std::memset(call.starts, 0, static_cast<size_t>(experts + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < call.most_pairs(); i++)
    if (call.ids[i] >= 0) call.starts[call.ids[i] + 1]++;
  for (int64_t e = 0; e < experts; e++) call.starts[e + 1] += call.starts[e];
  std::memcpy(call.next, call.starts, static_cast<size_t>(experts + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < call.most_pairs(); i++) {
    call.pair_of[i] = -1;
    if (call.ids[i] < 0) continue;
    const int64_t pair = call.next[call.ids[i]]++;
    call.pair_of[i] = static_cast<int32_t>(pair);
    call.token_of[pair] = static_cast<int32_t>(i / call.chosen);
  }
  return call.starts[experts];
}

int open_expert(const gblm_layer& layer, int64_t expert, Panels (&p)[3]) {
  for (int64_t i = 0; i < 3; i++) {
    const int64_t* place = layer.places + (3 * expert + i) * 2;
    const bool inside = place[0] >= 0 && place[1] >= 0 && place[0] <= layer.bytes &&
                        place[1] <= layer.bytes - place[0];
    if (!inside) return GBLM_BAD_PANELS;
    if (const int result = open_panels(layer.memory + place[0], place[1], &p[i])) return result;
  }
  const bool fit = p[0].columns == layer.columns && p[1].columns == layer.columns &&
                   p[1].rows == p[0].rows && p[2].columns == p[0].rows &&
                   p[2].rows == layer.columns;
  return fit ? GBLM_OK : GBLM_BAD_ARGUMENT;
}

// The products of all chosen experts; says how many experts, and how wide the widest of them is.
int open_experts(Call& call, int64_t* count, int64_t* widest) {
  *count = 0, *widest = 0;
  for (int64_t e = 0; e < call.layer.experts; e++) {
    const int64_t first = call.starts[e], pairs = call.starts[e + 1] - first;
    if (pairs == 0) continue;
    Panels p[3];
    if (const int result = open_expert(call.layer, e, p)) return result;
    const Product* before = *count > 0 ? &call.downs[*count - 1] : nullptr;
    // Often all experts meet the same single token, which then is packed once.
    const bool same = before != nullptr && pairs == 1 && before->tokens == 1 &&
                      call.token_of[first] == call.token_of[before->rows];
    call.inner[2 * *count] = Product{p[0], pairs, {}, first, same};
    call.inner[2 * *count + 1] = Product{p[1], pairs, {}, first, true};
    call.downs[(*count)++] = Product{p[2], pairs, {}, first};
    *widest = larger(*widest, p[0].rows);
  }
  return GBLM_OK;
}

// Activations of gate and up: rows of x, which are copied only if they do not lie together.
const void* gather(const void* self, const Product& product, int64_t first, int64_t count) {
  const Call& call = *static_cast<const Call*>(self);
  const int32_t* tokens = call.token_of + product.rows + first;
  const int64_t columns = product.panels.columns;
  bool together = true;
  for (int64_t t = 1; t < count; t++) together = together && tokens[t] == tokens[0] + t;
  if (together) return call.x + tokens[0] * columns;
  auto* rows = reinterpret_cast<uint16_t*>(t_rows.get(count * columns * 2));
  if (rows == nullptr) return nullptr;
  for (int64_t t = 0; t < count; t++)
    std::memcpy(rows + t * columns, call.x + tokens[t] * columns, static_cast<size_t>(columns) * 2);
  return rows;
}

// Activations of down: silu(gate) * up.
const void* gated(const void* self, const Product& product, int64_t first, int64_t count) {
  const Call& call = *static_cast<const Call*>(self);
  const int64_t columns = product.panels.columns;
  uint8_t* memory = t_rows.get(3 * columns * 4 + count * columns * 2);
  if (memory == nullptr) return nullptr;
  auto* sums = reinterpret_cast<float*>(memory);
  float* y = sums + 2 * columns;
  auto* rows = reinterpret_cast<uint16_t*>(y + columns);
  const Product& gate = call.inner[2 * (&product - call.downs)];
  const uint16_t* gates = gate.y.rounded + first * columns;
  const uint16_t* ups = (&gate + 1)->y.rounded + first * columns;
  for (int64_t t = 0; t < count; t++) {
    for (int64_t i = 0; i < columns; i++) sums[i] = from_bf16(gates[t * columns + i]);
    for (int64_t i = 0; i < columns; i++) sums[columns + i] = from_bf16(ups[t * columns + i]);
    call.isa.gate(sums, columns, y);
    for (int64_t i = 0; i < columns; i++) rows[t * columns + i] = to_bf16(y[i]);
  }
  return rows;
}

// Some columns of a token's results, weighted and added up.
void add_results(void* context, int64_t task) {
  const Call& call = *static_cast<const Call*>(context);
  const int64_t columns = call.layer.columns;
  const int64_t parts = (columns + kSumColumns - 1) / kSumColumns;
  const int64_t token = task / parts, first = task % parts * kSumColumns;
  const int64_t count = smaller(kSumColumns, columns - first);
  float sums[kSumColumns] = {};
  for (int64_t k = token * call.chosen; k < (token + 1) * call.chosen; k++) {
    if (call.pair_of[k] < 0) continue;
    const uint16_t* result = call.results + call.pair_of[k] * columns + first;
    const float share = call.shares[k];
    for (int64_t i = 0; i < count; i++) sums[i] += share * from_bf16(result[i]);
  }
  for (int64_t i = 0; i < count; i++) call.y[token * columns + first + i] = to_bf16(sums[i]);
}

int run_experts(Call& call, const gblm_pool* pool) {
  if (!allocate(t_lists, [&](Parts& parts) { call.lay_out_lists(parts); })) return GBLM_NO_MEMORY;
  const int64_t pairs = sort_pairs(call);
  int64_t count, widest;
  if (const int result = open_experts(call, &count, &widest)) return result;
  if (!allocate(t_values, [&](Parts& parts) { call.lay_out_values(parts, pairs, widest); }))
    return GBLM_NO_MEMORY;
  for (int64_t i = 0; i < count; i++) {
    const int64_t first = call.downs[i].rows;
    call.inner[2 * i].y = Output{call.gates + first * widest, nullptr};
    call.inner[2 * i + 1].y = Output{call.ups + first * widest, nullptr};
    call.downs[i].y = Output{call.results + first * call.layer.columns, nullptr};
  }
  const Source x{&call, gather}, between{&call, gated};
  if (const int result = multiply_all(call.isa, call.inner, 2 * count, x, pool)) return result;
  if (const int result = multiply_all(call.isa, call.downs, count, between, pool)) return result;
  const int64_t parts = (call.layer.columns + kSumColumns - 1) / kSumColumns;
  run(pool, call.tokens * parts, add_results, &call);
  return GBLM_OK;
}

}  // namespace

extern "C" {

int gblm_experts(const gblm_layer* layer, const uint16_t* x, int64_t tokens, const int32_t* ids,
                 const float* shares, int64_t chosen, uint16_t* y, const gblm_pool* pool) {
  if (layer == nullptr || layer->memory == nullptr || layer->places == nullptr ||
      layer->experts < 0 || layer->columns <= 0 || layer->columns > kMaxExtent)
    return GBLM_BAD_ARGUMENT;
  if (tokens < 0 || chosen < 0 || chosen > kMaxExtent) return GBLM_BAD_ARGUMENT;
  if (tokens > 0 && (x == nullptr || y == nullptr)) return GBLM_BAD_ARGUMENT;
  if (tokens * chosen > 0 && (ids == nullptr || shares == nullptr)) return GBLM_BAD_ARGUMENT;
  for (int64_t i = 0; i < tokens * chosen; i++)
    if (ids[i] >= layer->experts) return GBLM_BAD_ARGUMENT;
  for (int64_t t = 0; t < tokens; t += kMaxTokens) {
    const int64_t now = smaller(kMaxTokens, tokens - t), at = t * layer->columns;
    Call call{isa_in_use(),        *layer, x + at, now, ids + t * chosen,
              shares + t * chosen, chosen, y + at};
    if (const int result = run_experts(call, pool)) return result;
  }
  return GBLM_OK;
}

}  // extern "C"
