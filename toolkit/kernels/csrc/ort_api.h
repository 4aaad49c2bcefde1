// The part of ONNX Runtime's C ABI that a custom operator needs, so that one build serves every
// version since 1.17 and needs none of its headers.
//
// OrtApi is a table of functions that only grows at its end: a function is known by its place.
// Names and places are those of onnxruntime_c_api.h; tests/kernels/ort_abi.cpp compares them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;  // the first with KernelContext_ParallelFor

struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct OpAttr;
struct SessionOptions;
struct CustomOpDomain;
struct CustomOp;

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version)();
};

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum ElementType { kUndefined = 0, kFloat = 1, kUint8 = 2, kFloat16 = 10, kBfloat16 = 16 };
enum AttributeType { kInt = 1 };

struct Api {
  Status* (*CreateStatus)(ErrorCode, const char*);
  Status* (*CreateCustomOpDomain)(const char*, CustomOpDomain**);
  Status* (*CustomOpDomain_Add)(CustomOpDomain*, const CustomOp*);
  Status* (*AddCustomOpDomain)(SessionOptions*, CustomOpDomain*);
  Status* (*GetTensorMutableData)(Value*, void**);
  Status* (*CreateTensorTypeAndShapeInfo)(TensorInfo**);
  Status* (*SetTensorElementType)(TensorInfo*, ElementType);
  Status* (*SetDimensions)(TensorInfo*, const int64_t*, size_t);
  Status* (*GetTensorElementType)(const TensorInfo*, ElementType*);
  Status* (*GetDimensionsCount)(const TensorInfo*, size_t*);
  Status* (*GetDimensions)(const TensorInfo*, int64_t*, size_t);
  Status* (*GetSymbolicDimensions)(const TensorInfo*, const char**, size_t);
  Status* (*GetTensorTypeAndShape)(const Value*, TensorInfo**);
  Status* (*KernelInfoGetAttribute_int64)(const KernelInfo*, const char*, int64_t*);
  Status* (*KernelContext_GetInput)(const KernelContext*, size_t, const Value**);
  Status* (*KernelContext_GetOutput)(KernelContext*, size_t, const int64_t*, size_t, Value**);
  void (*ReleaseTensorTypeAndShapeInfo)(TensorInfo*);
  Status* (*KernelInfoGetConstantInput_tensor)(const KernelInfo*, size_t, int*, const Value**);
  Status* (*ShapeInferContext_GetInputTypeShape)(const ShapeContext*, size_t, TensorInfo**);
  Status* (*ShapeInferContext_GetAttribute)(const ShapeContext*, const char*, const OpAttr**);
  Status* (*ShapeInferContext_SetOutputTypeShape)(const ShapeContext*, size_t, const TensorInfo*);
  Status* (*SetSymbolicDimensions)(TensorInfo*, const char**, size_t);
  Status* (*ReadOpAttr)(const OpAttr*, AttributeType, void*, size_t, size_t*);
  Status* (*KernelContext_ParallelFor)(const KernelContext*, void (*)(void*, size_t), size_t,
                                       size_t, void*);
};

// The places of Api's members, in their order.
constexpr size_t kPlaces[] = {0,  26, 27, 28, 51, 57,  58,  59,  60,  61,  62,  63,
                              65, 86, 90, 91, 99, 249, 268, 269, 270, 271, 272, 274};
static_assert(sizeof(Api) == sizeof kPlaces / sizeof *kPlaces * sizeof(void*));

// OrtCustomOp as of kApiVersion. Every callback gets the operator itself.
struct CustomOp {
  uint32_t version;
  void* CreateKernel;  // before version 16
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void* KernelCompute;  // before version 16
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const void* const* api, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

}  // namespace ort
