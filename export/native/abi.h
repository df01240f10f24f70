// The slice of onnxruntime's C ABI that custom operators need, so that no header of it is needed to build them.
//
// Slots and the layout of OrtCustomOp are those of onnxruntime_c_api.h, which only ever appends to them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

struct OrtStatus;
struct OrtValue;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtShape;

struct OrtApiBase {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const void* api, const void* info);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const void* api, const void* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShape)(const OrtCustomOp*, void*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

namespace ort {

constexpr uint32_t kApiVersion = 18;        // of the table that is asked for: onnxruntime 1.18 and later have it
constexpr uint32_t kCustomOpVersion = 17;   // the layout above
constexpr int kInvalidArgument = 2;         // OrtErrorCode
constexpr size_t kTasksOfStep = 8;          // more than most machines have cores left for one token
// ONNXTensorElementDataType
constexpr int kFloat = 1, kUInt8 = 2, kInt8 = 3, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16;

enum Slot {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseTensorTypeAndShape = 99,
  kKernelContextParallelFor = 274,
};

inline const void* const* api = nullptr;

template <class Result, class... Arguments>
Result call(Slot slot, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(api[slot]))(arguments...);
}

inline OrtStatus* invalid(const char* message) { return call<OrtStatus*>(kCreateStatus, kInvalidArgument, message); }

// Shape and memory of an input; `error` is what onnxruntime said, if it did.
struct Tensor {
  static constexpr size_t kMaxRank = 8;
  void* data = nullptr;
  int64_t shape[kMaxRank] = {};
  size_t rank = 0;
  OrtStatus* error = nullptr;

  size_t last() const { return rank ? static_cast<size_t>(shape[rank - 1]) : 1; }
  size_t rows() const {  // the product of all dimensions but the last
    size_t n = 1;
    for (size_t i = 0; i + 1 < rank; ++i) n *= static_cast<size_t>(shape[i]);
    return n;
  }
};

inline Tensor input(OrtKernelContext* context, size_t index) {
  Tensor t;
  const OrtValue* value = nullptr;
  const OrtKernelContext* reader = context;
  if ((t.error = call<OrtStatus*>(kKernelContextGetInput, reader, index, &value))) return t;
  OrtShape* shape = nullptr;
  if ((t.error = call<OrtStatus*>(kGetTensorTypeAndShape, value, &shape))) return t;
  const OrtShape* known = shape;
  t.error = call<OrtStatus*>(kGetDimensionsCount, known, &t.rank);
  if (!t.error && t.rank > Tensor::kMaxRank) t.error = invalid("pp_fx: a tensor has more than 8 dimensions");
  if (!t.error) t.error = call<OrtStatus*>(kGetDimensions, known, &t.shape[0], t.rank);
  call<void>(kReleaseTensorTypeAndShape, shape);
  if (!t.error) t.error = call<OrtStatus*>(kGetTensorMutableData, const_cast<OrtValue*>(value), &t.data);
  return t;
}

inline OrtStatus* output(OrtKernelContext* context, const int64_t* shape, size_t rank, void** data) {
  OrtValue* value = nullptr;
  const size_t first = 0;
  if (auto* error = call<OrtStatus*>(kKernelContextGetOutput, context, first, shape, rank, &value)) return error;
  return call<OrtStatus*>(kGetTensorMutableData, value, data);
}

inline OrtStatus* first_error(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    if (t->error) return t->error;
  return nullptr;
}

// An output as large as x, but for the last dimension.
inline OrtStatus* output_like(OrtKernelContext* context, const Tensor& x, size_t last, void** data) {
  int64_t shape[Tensor::kMaxRank];
  std::copy(x.shape, x.shape + x.rank, shape);
  shape[x.rank - 1] = static_cast<int64_t>(last);
  return output(context, shape, x.rank, data);
}

// Run `task(i)` for i in [0, count) on the session's own thread pool.
template <class Task>
OrtStatus* parallel_for(OrtKernelContext* context, size_t count, Task& task) {
  void (*run)(void*, size_t) = [](void* given, size_t i) { (*static_cast<Task*>(given))(i); };
  const OrtKernelContext* reader = context;
  const size_t automatic = 0;
  return call<OrtStatus*>(kKernelContextParallelFor, reader, run, count, automatic, static_cast<void*>(&task));
}

}  // namespace ort
