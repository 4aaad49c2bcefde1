// Compiles only if csrc/ort_api.h says of ONNX Runtime's C API what its own header says.
#include <onnxruntime_c_api.h>

#include "ort_api.h"

static_assert(ort::kApiVersion <= ORT_API_VERSION);

// The place of each function, in the order of ort::Api.
#define GBLM_PLACE(member)                                                  \
  static_assert(ort::kPlaces[offsetof(ort::Api, member) / sizeof(void*)] == \
                offsetof(OrtApi, member) / sizeof(void*))
GBLM_PLACE(CreateStatus);
GBLM_PLACE(CreateCustomOpDomain);
GBLM_PLACE(CustomOpDomain_Add);
GBLM_PLACE(AddCustomOpDomain);
GBLM_PLACE(GetTensorMutableData);
GBLM_PLACE(CreateTensorTypeAndShapeInfo);
GBLM_PLACE(SetTensorElementType);
GBLM_PLACE(SetDimensions);
GBLM_PLACE(GetTensorElementType);
GBLM_PLACE(GetDimensionsCount);
GBLM_PLACE(GetDimensions);
GBLM_PLACE(GetSymbolicDimensions);
GBLM_PLACE(GetTensorTypeAndShape);
GBLM_PLACE(KernelInfoGetAttribute_int64);
GBLM_PLACE(KernelContext_GetInput);
GBLM_PLACE(KernelContext_GetOutput);
GBLM_PLACE(ReleaseTensorTypeAndShapeInfo);
GBLM_PLACE(KernelInfoGetConstantInput_tensor);
GBLM_PLACE(ShapeInferContext_GetInputTypeShape);
GBLM_PLACE(ShapeInferContext_GetAttribute);
GBLM_PLACE(ShapeInferContext_SetOutputTypeShape);
GBLM_PLACE(SetSymbolicDimensions);
GBLM_PLACE(ReadOpAttr);
GBLM_PLACE(KernelContext_ParallelFor);

#define GBLM_FIELD(member) \
  static_assert(offsetof(ort::CustomOp, member) == offsetof(OrtCustomOp, member))
GBLM_FIELD(version);
GBLM_FIELD(GetName);
GBLM_FIELD(GetExecutionProviderType);
GBLM_FIELD(GetInputType);
GBLM_FIELD(GetInputTypeCount);
GBLM_FIELD(GetOutputType);
GBLM_FIELD(GetOutputTypeCount);
GBLM_FIELD(KernelDestroy);
GBLM_FIELD(GetInputCharacteristic);
GBLM_FIELD(GetOutputCharacteristic);
GBLM_FIELD(GetInputMemoryType);
GBLM_FIELD(GetVariadicInputMinArity);
GBLM_FIELD(GetVariadicInputHomogeneity);
GBLM_FIELD(GetVariadicOutputMinArity);
GBLM_FIELD(GetVariadicOutputHomogeneity);
GBLM_FIELD(CreateKernelV2);
GBLM_FIELD(KernelComputeV2);
GBLM_FIELD(InferOutputShapeFn);
GBLM_FIELD(GetStartVersion);
GBLM_FIELD(GetEndVersion);

#define GBLM_NUMBER(ours, theirs) static_assert(int(ours) == int(theirs))
GBLM_NUMBER(ort::kFail, ORT_FAIL);
GBLM_NUMBER(ort::kInvalidArgument, ORT_INVALID_ARGUMENT);
GBLM_NUMBER(ort::kUndefined, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED);
GBLM_NUMBER(ort::kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
GBLM_NUMBER(ort::kUint8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
GBLM_NUMBER(ort::kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
GBLM_NUMBER(ort::kBfloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
GBLM_NUMBER(ort::kInt, ORT_OP_ATTR_INT);
GBLM_NUMBER(0, INPUT_OUTPUT_REQUIRED);
GBLM_NUMBER(0, OrtMemTypeDefault);
