// The ONNX Runtime operators of the domain ai.gblm, and its thread pool as a gblm_pool.
//
//   y [..., out_features] = Linear(x [..., in_features], panels [bytes] uint8 constant)
//   y [..., out_features] = GatedLinear(x, panels): silu(x G^T) * (x U^T), panels of G over U
//
// x and y are both float32, float16 or bfloat16. Panels are what gblm_prepare makes: an operator
// cannot prepare weights itself without holding them twice.
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "gblm_kernels.h"
#include "ort_api.h"
#include "ort_floats.h"

namespace {

ort::Api api;

// Status of a failed call, or the next statement.
#define GBLM_TRY(call) \
  if (ort::Status* const status = (call)) return status

ort::Status* refuse(const std::string& what) {
  return api.CreateStatus(ort::kInvalidArgument, ("ai.gblm: " + what).c_str());
}

struct Kernel {
  const void* panels;
  gblm_info info;
  bool gated;

  int64_t features() const { return gated ? info.rows / 2 : info.rows; }
};

struct Op : ort::CustomOp {
  const char* name;
  bool gated;
};

struct TensorInfo {
  ort::TensorInfo* info = nullptr;
  TensorInfo() = default;
  TensorInfo(const TensorInfo&) = delete;
  TensorInfo& operator=(const TensorInfo&) = delete;
  ~TensorInfo() {
    if (info != nullptr) api.ReleaseTensorTypeAndShapeInfo(info);
  }
};

struct Shape {
  ort::ElementType type;
  std::vector<int64_t> sizes;
};

ort::Status* read_shape(const ort::TensorInfo* info, Shape* shape) {
  size_t count;
  GBLM_TRY(api.GetTensorElementType(info, &shape->type));
  GBLM_TRY(api.GetDimensionsCount(info, &count));
  shape->sizes.resize(count);
  return api.GetDimensions(info, shape->sizes.data(), count);
}

// ONNX Runtime does not say how many threads a session has. Tasks take their work when they start,
// so that one more task than there are threads costs one look at a counter.
int pool_threads(void*) {
  static const int threads = static_cast<int>(std::thread::hardware_concurrency());
  return threads > 0 ? threads : 1;
}

struct Tasks {
  void (*task)(void*, int64_t);
  void* context;
};

void run_task(void* context, size_t index) {
  const Tasks& tasks = *static_cast<const Tasks*>(context);
  tasks.task(tasks.context, static_cast<int64_t>(index));
}

// The context of one call, and what the thread pool complained about.
struct Call {
  ort::KernelContext* context;
  ort::Status* status;
};

void pool_run(void* self, int64_t count, void (*task)(void*, int64_t), void* context) {
  Call& call = *static_cast<Call*>(self);
  Tasks tasks{task, context};
  if (call.status == nullptr)
    call.status = api.KernelContext_ParallelFor(call.context, run_task, static_cast<size_t>(count),
                                                0, &tasks);
}

std::vector<float> widen(const uint16_t* from, int64_t count, ort::ElementType type) {
  std::vector<float> wide(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++)
    wide[static_cast<size_t>(i)] = type == ort::kFloat16 ? from_f16(from[i]) : from_bf16(from[i]);
  return wide;
}

void narrow(const float* from, int64_t count, ort::ElementType type, uint16_t* to) {
  for (int64_t i = 0; i < count; i++)
    to[i] = type == ort::kFloat16 ? to_f16(from[i]) : to_bf16(from[i]);
}

// Memory of a thread for its next call.
float* kept_memory(int64_t count) {
  static thread_local std::vector<float> memory;
  if (memory.size() < static_cast<size_t>(count)) memory.resize(static_cast<size_t>(count));
  return memory.data();
}

int multiply_wide(const Kernel& kernel, const float* x, int64_t tokens, float* y,
                  const gblm_pool* pool) {
  const int64_t bytes = kernel.info.bytes;
  if (!kernel.gated) return gblm_linear_f32(kernel.panels, bytes, x, tokens, y, pool);
  float* sums = kept_memory(tokens * kernel.info.rows);
  const int error = gblm_linear_f32(kernel.panels, bytes, x, tokens, sums, pool);
  gblm_gate(sums, tokens, kernel.features(), y, pool);
  return error;
}

int multiply(const Kernel& kernel, ort::ElementType type, const void* x, int64_t tokens, void* y,
             const gblm_pool* pool) {
  if (type == ort::kFloat)
    return multiply_wide(kernel, static_cast<const float*>(x), tokens, static_cast<float*>(y),
                         pool);
  const auto* halves = static_cast<const uint16_t*>(x);
  auto* rounded = static_cast<uint16_t*>(y);
  if (type == ort::kBfloat16 && !kernel.gated)
    return gblm_linear(kernel.panels, kernel.info.bytes, halves, tokens, rounded, pool);
  const std::vector<float> wide = widen(halves, tokens * kernel.info.columns, type);
  std::vector<float> sums(static_cast<size_t>(tokens * kernel.features()));
  const int error = multiply_wide(kernel, wide.data(), tokens, sums.data(), pool);
  narrow(sums.data(), tokens * kernel.features(), type, rounded);
  return error;
}

ort::Status* create(const ort::CustomOp* op, const void* const*, const ort::KernelInfo* info,
                    void** made) {
  int constant = 0;
  const ort::Value* value = nullptr;
  GBLM_TRY(api.KernelInfoGetConstantInput_tensor(info, 1, &constant, &value));
  if (!constant) return refuse("panels must be a constant initializer");
  TensorInfo tensor;
  Shape shape;
  GBLM_TRY(api.GetTensorTypeAndShape(value, &tensor.info));
  GBLM_TRY(read_shape(tensor.info, &shape));
  if (shape.sizes.size() != 1) return refuse("panels must have one dimension");
  void* panels;
  GBLM_TRY(api.GetTensorMutableData(const_cast<ort::Value*>(value), &panels));
  gblm_info found;
  if (const int error = gblm_inspect(panels, shape.sizes[0], &found))
    return refuse(std::string(gblm_error(error)) +
                  ", or of another version of gblm: export the model again");
  int64_t rows, columns;
  GBLM_TRY(api.KernelInfoGetAttribute_int64(info, "out_features", &rows));
  GBLM_TRY(api.KernelInfoGetAttribute_int64(info, "in_features", &columns));
  const bool gated = static_cast<const Op*>(op)->gated;
  if (rows * (gated ? 2 : 1) != found.rows || columns != found.columns)
    return refuse("the panels hold a weight of another shape than the node says");
  *made = new Kernel{panels, found, gated};
  return nullptr;
}

ort::Status* compute(void* self, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  const ort::Value* x;
  TensorInfo tensor;
  Shape shape;
  GBLM_TRY(api.KernelContext_GetInput(context, 0, &x));
  GBLM_TRY(api.GetTensorTypeAndShape(x, &tensor.info));
  GBLM_TRY(read_shape(tensor.info, &shape));
  if (shape.sizes.empty() || shape.sizes.back() != kernel.info.columns)
    return refuse("x must have " + std::to_string(kernel.info.columns) + " features");
  if (shape.type != ort::kFloat && shape.type != ort::kFloat16 && shape.type != ort::kBfloat16)
    return refuse("x must be float32, float16 or bfloat16");
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < shape.sizes.size(); i++) tokens *= shape.sizes[i];
  shape.sizes.back() = kernel.features();
  ort::Value* y;
  void *from, *to;
  GBLM_TRY(api.KernelContext_GetOutput(context, 0, shape.sizes.data(), shape.sizes.size(), &y));
  GBLM_TRY(api.GetTensorMutableData(const_cast<ort::Value*>(x), &from));
  GBLM_TRY(api.GetTensorMutableData(y, &to));
  Call call{context, nullptr};
  const gblm_pool pool{&call, pool_threads, pool_run};
  const int error = tokens == 0 ? GBLM_OK : multiply(kernel, shape.type, from, tokens, to, &pool);
  if (call.status != nullptr) return call.status;
  return error ? refuse(gblm_error(error)) : nullptr;
}

// The shape of x with another last dimension; names of dimensions stay.
ort::Status* infer_shape(const ort::CustomOp*, ort::ShapeContext* context) {
  ort::TensorInfo* x;  // the context's own
  TensorInfo y;
  Shape shape;
  GBLM_TRY(api.ShapeInferContext_GetInputTypeShape(context, 0, &x));
  GBLM_TRY(read_shape(x, &shape));
  const size_t count = shape.sizes.size();
  if (count == 0) return nullptr;  // unknown
  std::vector<const char*> names(count);
  GBLM_TRY(api.GetSymbolicDimensions(x, names.data(), count));
  const ort::OpAttr* attribute;
  size_t bytes;
  GBLM_TRY(api.ShapeInferContext_GetAttribute(context, "out_features", &attribute));
  GBLM_TRY(api.ReadOpAttr(attribute, ort::kInt, &shape.sizes.back(), sizeof(int64_t), &bytes));
  names.back() = "";
  GBLM_TRY(api.CreateTensorTypeAndShapeInfo(&y.info));
  GBLM_TRY(api.SetTensorElementType(y.info, shape.type));
  GBLM_TRY(api.SetDimensions(y.info, shape.sizes.data(), count));
  GBLM_TRY(api.SetSymbolicDimensions(y.info, names.data(), count));
  return api.ShapeInferContext_SetOutputTypeShape(context, 0, y.info);
}

Op make_op(const char* name, bool gated) {
  Op op{{}, name, gated};
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp* self) { return static_cast<const Op*>(self)->name; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return 2; };
  op.GetInputType = [](const ort::CustomOp*, size_t index) {
    return index == 0 ? ort::kUndefined : ort::kUint8;
  };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kUndefined; };
  const auto required = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetInputCharacteristic = op.GetOutputCharacteristic = op.GetInputMemoryType = required;
  const auto never = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = never;
  op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = never;
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = infer_shape;
  op.GetStartVersion = op.GetEndVersion = [](const ort::CustomOp*) { return 1; };
  return op;
}

}  // namespace

extern "C" {

// What ONNX Runtime calls on a custom operator library.
GBLM_API ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const void* const* table = base->get_api(ort::kApiVersion);
  if (table == nullptr) {
    std::memcpy(&api.CreateStatus, base->get_api(1), sizeof(void*));
    return refuse(std::string("ONNX Runtime 1.17 or later is needed, this is ") + base->version());
  }
  for (size_t i = 0; i < sizeof ort::kPlaces / sizeof *ort::kPlaces; i++)
    std::memcpy(reinterpret_cast<char*>(&api) + i * sizeof(void*), table + ort::kPlaces[i],
                sizeof(void*));
  static const Op ops[] = {make_op("Linear", false), make_op("GatedLinear", true)};
  static ort::CustomOpDomain* domain = nullptr;  // ONNX Runtime neither copies nor frees it
  static std::mutex alone;
  const std::lock_guard<std::mutex> lock(alone);
  if (domain == nullptr) {
    ort::CustomOpDomain* made;
    GBLM_TRY(api.CreateCustomOpDomain("ai.gblm", &made));
    for (const Op& op : ops) GBLM_TRY(api.CustomOpDomain_Add(made, &op));
    domain = made;
  }
  return api.AddCustomOpDomain(options, domain);
}

}  // extern "C"
