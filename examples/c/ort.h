/* The functions of onnxruntime's C API that generate.c calls, by their place in the OrtApi table.
 *
 * With onnxruntime_c_api.h at hand, include that instead: OrtApi has these functions as members of the same names. */
#ifndef ORT_H
#define ORT_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)(void);
} OrtApiBase;

enum { kApiVersion = 18, kFloat = 1, kInt64 = 7 };

static const void* const* ort_api;
#define ORT(slot, ...) ((void* (*)(__VA_ARGS__))ort_api[slot])

#define GetErrorMessage ((const char* (*)(void*))ort_api[2])
#define CreateEnv ORT(3, int, const char*, void**)
#define CreateSession ORT(7, void*, const char*, const void*, void**)
#define Run ORT(9, void*, const void*, const char* const*, const void* const*, size_t, const char* const*, size_t, void**)
#define CreateSessionOptions ORT(10, void**)
#define SetIntraOpNumThreads ORT(24, void*, int)
#define RegisterCustomOpsLibrary ORT(29, void*, const char*, void**)
#define SessionGetInputCount ORT(30, const void*, size_t*)
#define SessionGetOutputCount ORT(31, const void*, size_t*)
#define SessionGetInputTypeInfo ORT(33, const void*, size_t, void**)
#define SessionGetInputName ORT(36, const void*, size_t, void*, char**)
#define SessionGetOutputName ORT(37, const void*, size_t, void*, char**)
#define CreateTensorWithDataAsOrtValue ORT(49, const void*, void*, size_t, const int64_t*, size_t, int, void**)
#define GetTensorMutableData ORT(51, void*, void**)
#define CastTypeInfoToTensorInfo ORT(55, const void*, const void**)
#define GetDimensions ORT(62, const void*, int64_t*, size_t)
#define GetTensorTypeAndShape ORT(65, const void*, void**)
#define CreateCpuMemoryInfo ORT(69, int, int, void**)
#define GetAllocatorWithDefaultOptions ORT(78, void**)
#define ReleaseValue ((void (*)(void*))ort_api[96])
#define ReleaseTypeInfo ((void (*)(void*))ort_api[98])
#define ReleaseTensorTypeAndShapeInfo ((void (*)(void*))ort_api[99])

#endif
