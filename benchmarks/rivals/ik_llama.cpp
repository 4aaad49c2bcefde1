// What benchmarks/ik_llama.py needs of ik_llama.cpp, in functions without structures.
//
//     git clone https://github.com/ikawrakow/ik_llama.cpp && cd ik_llama.cpp
//     git checkout COMMIT   # that of benchmarks/ik_llama.py
//     cmake -B build -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
//     cmake --build build --target llama
//     g++ -O2 -std=c++20 -shared -fPIC -Iinclude -Iggml/include GBLM/benchmarks/rivals/ik_llama.cpp
//         -Lbuild/src -lllama -Wl,-rpath,$PWD/build/src:$PWD/build/ggml/src -o libik_shim.so
#include <algorithm>

#include "llama.h"

struct Model {
  llama_model *model;
  llama_context *context;
  int past = 0;
};

extern "C" {

Model *ik_open(const char *path, int threads, int tokens) {
  auto weights = llama_model_default_params();
  weights.repack_tensors = true;  // as -rtr does: rows interleaved for its kernels
  weights.use_mmap = false;
  auto how = llama_context_default_params();
  how.n_ctx = tokens;
  how.n_batch = how.n_ubatch = 512;
  how.n_threads = how.n_threads_batch = threads;
  how.flash_attn = true;
  auto *model = llama_model_load_from_file(path, weights);
  auto *context = model ? llama_init_from_model(model, how) : nullptr;
  return context ? new Model{model, context} : nullptr;
}

int ik_vocabulary(const Model *m) { return llama_n_vocab(m->model); }

void ik_reset(Model *m) {
  llama_kv_cache_clear(m->context);
  m->past = 0;
}

// Appends tokens; gives the most likely next one, or -1.
int ik_run(Model *m, llama_token *tokens, int count) {
  if (llama_decode(m->context, llama_batch_get_one(tokens, count, m->past, 0))) return -1;
  m->past += count;
  const float *logits = llama_get_logits_ith(m->context, -1);
  return std::max_element(logits, logits + ik_vocabulary(m)) - logits;
}
}
