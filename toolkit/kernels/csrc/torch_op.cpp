// The PyTorch operators gblm::cpu_linear and gblm::cpu_experts, and PyTorch's thread pool as a
// gblm_pool.
//
// Built without PyTorch's headers: the few functions of its stable C ABI that are needed are
// declared here and looked up in the libtorch_cpu that the process has loaded. So one build serves
// every PyTorch that has them, and `pip install` needs a compiler but no PyTorch.
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "gblm_kernels.h"

namespace {

using TensorHandle = void*;
using LibraryHandle = void*;
using StableValue = uint64_t;  // PyTorch's StableIValue: a tensor handle or an int64
using BoxedKernel = void (*)(StableValue*, uint64_t, uint64_t);

struct Torch {
  int32_t (*get_data_ptr)(TensorHandle, void**);
  int32_t (*get_sizes)(TensorHandle, int64_t**);
  int32_t (*get_dim)(TensorHandle, int64_t*);
  int32_t (*get_numel)(TensorHandle, int64_t*);
  int32_t (*get_dtype)(TensorHandle, int32_t*);
  int32_t (*is_contiguous)(TensorHandle, bool*);
  int32_t (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                           TensorHandle*);
  int32_t (*delete_tensor)(TensorHandle);
  int32_t (*dtype_bfloat16)();
  int32_t (*dtype_uint8)();
  int32_t (*dtype_int32)();
  int32_t (*dtype_int64)();
  int32_t (*dtype_float32)();
  int32_t (*device_type_cpu)();
  int32_t (*library_init_impl)(const char*, const char*, const char*, uint32_t, LibraryHandle*);
  int32_t (*library_impl)(LibraryHandle, const char*, BoxedKernel);
  uint32_t (*num_threads)(uint32_t*);
  int32_t (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
};
Torch torch;
int32_t kBf16, kUint8, kInt32, kInt64, kFloat32, kCpu;

void check(int32_t error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("gblm kernels: ") + what);
}

void check_result(int result) { check(result, gblm_error(result)); }

int pool_threads(void*) {
  uint32_t threads = 1;
  torch.num_threads(&threads);
  return static_cast<int>(threads);
}

struct Tasks {
  void (*task)(void*, int64_t);
  void* context;
};

void run_range(int64_t begin, int64_t end, void* context) {
  const Tasks& tasks = *static_cast<const Tasks*>(context);
  for (int64_t i = begin; i < end; i++) tasks.task(tasks.context, i);
}

void pool_run(void*, int64_t count, void (*task)(void*, int64_t), void* context) {
  Tasks tasks{task, context};
  if (count == 1)
    task(context, 0);
  else
    torch.parallel_for(0, count, 1, run_range, &tasks);
}

const gblm_pool kPool = {nullptr, pool_threads, pool_run};

// Owned by the kernel that was given it.
class Tensor {
 public:
  explicit Tensor(StableValue value) : handle_(reinterpret_cast<TensorHandle>(value)) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) torch.delete_tensor(handle_);
  }

  void* data() const {
    void* pointer;
    check(torch.get_data_ptr(handle_, &pointer), "no data");
    return pointer;
  }
  int64_t numel() const {
    int64_t count;
    check(torch.get_numel(handle_, &count), "no size");
    return count;
  }
  int64_t dim() const {
    int64_t count;
    check(torch.get_dim(handle_, &count), "no dimensions");
    return count;
  }
  const int64_t* sizes() const {
    int64_t* sizes;
    check(torch.get_sizes(handle_, &sizes), "no sizes");
    return sizes;
  }
  void expect(int32_t dtype, const char* message) const {
    int32_t found;
    bool contiguous;
    check(torch.get_dtype(handle_, &found), "no dtype");
    check(torch.is_contiguous(handle_, &contiguous), "no strides");
    check(found != dtype || !contiguous, message);
  }
  StableValue release() {
    const TensorHandle handle = handle_;
    handle_ = nullptr;
    return reinterpret_cast<StableValue>(handle);
  }

 private:
  TensorHandle handle_;
};

constexpr int64_t kMaxDims = 16;

// Activations [..., features].
struct Tokens {
  int64_t count, features;

  explicit Tokens(const Tensor& x) {
    x.expect(kBf16, "x must be contiguous bfloat16");
    check(x.dim() < 1 || x.dim() > kMaxDims, "x must have 1 to 16 dimensions");
    features = x.sizes()[x.dim() - 1];
    count = 1;
    for (int64_t d = 0; d < x.dim() - 1; d++) count *= x.sizes()[d];
  }
};

// Memory for so many features of each token of x: [..., features].
Tensor make_result(const Tensor& x, int64_t features) {
  int64_t sizes[kMaxDims], strides[kMaxDims], stride = 1;
  for (int64_t d = x.dim() - 1; d >= 0; d--) {
    sizes[d] = d == x.dim() - 1 ? features : x.sizes()[d];
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  TensorHandle made;
  check(torch.empty_strided(x.dim(), sizes, strides, kBf16, kCpu, -1, &made), "no memory");
  return Tensor(reinterpret_cast<StableValue>(made));
}

// cpu_linear(Tensor x, Tensor panels, int out_features) -> Tensor
void cpu_linear(StableValue* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]), panels(stack[1]);
  const auto rows = static_cast<int64_t>(stack[2]);
  const Tokens tokens(x);
  panels.expect(kUint8, "panels must be contiguous uint8");
  gblm_info info;
  check_result(gblm_inspect(panels.data(), panels.numel(), &info));
  check(tokens.features != info.columns, "x has another number of features than the weight");
  check(rows != info.rows, "out_features is not that of the weight");
  Tensor y = make_result(x, rows);
  if (tokens.count > 0)
    check_result(gblm_linear(panels.data(), panels.numel(), static_cast<const uint16_t*>(x.data()),
                             tokens.count, static_cast<uint16_t*>(y.data()), &kPool));
  stack[0] = y.release();
}

// cpu_experts(Tensor x, Tensor ids, Tensor shares, Tensor panels, Tensor places) -> Tensor
void cpu_experts(StableValue* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]), ids(stack[1]), shares(stack[2]), panels(stack[3]), places(stack[4]);
  const Tokens tokens(x);
  ids.expect(kInt32, "ids must be contiguous int32");
  shares.expect(kFloat32, "shares must be contiguous float32");
  panels.expect(kUint8, "panels must be contiguous uint8");
  places.expect(kInt64, "places must be contiguous int64");
  const int64_t chosen = tokens.count > 0 ? ids.numel() / tokens.count : 0;
  check(ids.numel() != chosen * tokens.count || shares.numel() != ids.numel(),
        "ids and shares must have as many of each token");
  check(places.numel() % 6 != 0, "places must be [experts, 3, 2]");
  Tensor y = make_result(x, tokens.features);
  const gblm_layer layer{static_cast<const uint8_t*>(panels.data()), panels.numel(),
                         static_cast<const int64_t*>(places.data()), places.numel() / 6,
                         tokens.features};
  if (tokens.count > 0)
    check_result(gblm_experts(&layer, static_cast<const uint16_t*>(x.data()), tokens.count,
                              static_cast<const int32_t*>(ids.data()),
                              static_cast<const float*>(shares.data()), chosen,
                              static_cast<uint16_t*>(y.data()), &kPool));
  stack[0] = y.release();
}

template <class Function>
bool find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

}  // namespace

extern "C" {

// Register the operators. 0, or -1 when this PyTorch lacks a function of the stable ABI.
GBLM_API int gblm_register_torch(const char* libtorch) {
  static LibraryHandle library = nullptr;
  if (library != nullptr) return 0;
  void* lib = dlopen(libtorch, RTLD_LAZY | RTLD_NOLOAD);
  if (lib == nullptr) return -1;
  const bool all = find(lib, "aoti_torch_get_data_ptr", &torch.get_data_ptr) &&
                   find(lib, "aoti_torch_get_sizes", &torch.get_sizes) &&
                   find(lib, "aoti_torch_get_dim", &torch.get_dim) &&
                   find(lib, "aoti_torch_get_numel", &torch.get_numel) &&
                   find(lib, "aoti_torch_get_dtype", &torch.get_dtype) &&
                   find(lib, "aoti_torch_is_contiguous", &torch.is_contiguous) &&
                   find(lib, "aoti_torch_empty_strided", &torch.empty_strided) &&
                   find(lib, "aoti_torch_delete_tensor_object", &torch.delete_tensor) &&
                   find(lib, "aoti_torch_dtype_bfloat16", &torch.dtype_bfloat16) &&
                   find(lib, "aoti_torch_dtype_uint8", &torch.dtype_uint8) &&
                   find(lib, "aoti_torch_dtype_int32", &torch.dtype_int32) &&
                   find(lib, "aoti_torch_dtype_int64", &torch.dtype_int64) &&
                   find(lib, "aoti_torch_dtype_float32", &torch.dtype_float32) &&
                   find(lib, "aoti_torch_device_type_cpu", &torch.device_type_cpu) &&
                   find(lib, "aoti_torch_library_init_impl", &torch.library_init_impl) &&
                   find(lib, "aoti_torch_library_impl", &torch.library_impl) &&
                   find(lib, "torch_get_num_threads", &torch.num_threads) &&
                   find(lib, "torch_parallel_for", &torch.parallel_for);
  if (!all) return -1;
  kBf16 = torch.dtype_bfloat16();
  kUint8 = torch.dtype_uint8();
  kInt32 = torch.dtype_int32();
  kInt64 = torch.dtype_int64();
  kFloat32 = torch.dtype_float32();
  kCpu = torch.device_type_cpu();
  if (torch.library_init_impl("gblm", "CPU", __FILE__, __LINE__, &library)) return -1;
  const bool failed = torch.library_impl(library, "cpu_linear", cpu_linear) ||
                      torch.library_impl(library, "cpu_experts", cpu_experts);
  return failed ? -1 : 0;
}

// PyTorch's threads, once the operators are registered.
GBLM_API const gblm_pool* gblm_torch_pool(void) { return &kPool; }

}  // extern "C"
