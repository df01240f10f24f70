// The operators of domain pp_fx as native onnxruntime kernels for the CPU; export/functions.py says what each computes.
//
// pp-fx build-ort-ops compiles this file; a session that registers the library runs these kernels in place of the
// operators' function bodies.

#include <memory>
#include <new>
#include <vector>

#include "abi.h"
#include "products.h"
#include "quantized_ops.h"
#include "strongest.h"

#ifndef PP_FX_VERSION
#error "define PP_FX_VERSION, as pp-fx build-ort-ops does"
#endif

namespace {

using kernels::dots_of_rows;
using ort::Tensor;

constexpr size_t kRowsOfTask = 32;     // weight rows of one task of a product
constexpr size_t kRowsOfX = 64;        // rows of X that a task holds in the cache while it goes over its weights
constexpr size_t kSliceOfTask = 128;   // summed rows of one task; each keeps a partial sum
constexpr size_t kMaxSlices = 16;
constexpr size_t kPartialSums = 1 << 22;  // numbers, all slices together
constexpr size_t kColumnsOfTask = 64;  // right-hand sides of one task of a solve

// x as floats: itself, or a copy in `room`.
const float* floats(const float* x, size_t, std::vector<float>&) { return x; }
template <class T>
const float* floats(const T* x, size_t count, std::vector<float>& room) {
  room.resize(count);
  for (size_t i = 0; i < count; ++i) room[i] = kernels::widen(x[i]);
  return room.data();
}

// `take(m, n, last, sums)` of every row m of x and every `step`-th result n: the sums of the weight rows `four(n, last)`.
template <class T, class Four, class Take>
OrtStatus* products(OrtKernelContext* context, const float* x, size_t rows, size_t depth, size_t width, size_t step,
                    Four four, Take take) {
  auto task = [&](size_t index) {
    const size_t last = std::min(width, (index + 1) * kRowsOfTask);
    for (size_t top = 0; top < rows; top += kRowsOfX)
      for (size_t n = index * kRowsOfTask; n < last; n += step) {
        const T* weights[4];
        four(n, last, weights);
        dots_of_rows(weights, x + top * depth, std::min(kRowsOfX, rows - top), depth,
                     [&](size_t m, float a, float b, float c, float d) { take(top + m, n, last, {a, b, c, d}); });
      }
  };
  return ort::parallel_for(context, (width + kRowsOfTask - 1) / kRowsOfTask, task);
}

// X [..., H], weight [k, H] -> X weight^T [..., k]
template <class T>
OrtStatus* compact_linear(OrtKernelContext* context) {
  const Tensor x = ort::input(context, 0), weight = ort::input(context, 1);
  if (auto* error = ort::first_error({&x, &weight})) return error;
  if (x.rank < 1 || weight.rank != 2 || weight.last() != x.last())
    return ort::invalid("pp_fx.CompactLinear: X [..., H] and weight [k, H] do not fit each other");
  const size_t depth = x.last(), rows = x.rows(), width = static_cast<size_t>(weight.shape[0]);
  void* out = nullptr;
  if (auto* error = ort::output_like(context, x, width, &out)) return error;
  if (!rows || !width) return nullptr;
  std::vector<float> room;
  const float* wide = floats(static_cast<const T*>(x.data), rows * depth, room);
  const T* w = static_cast<const T*>(weight.data);
  T* y = static_cast<T*>(out);
  auto four = [&](size_t n, size_t last, const T* (&rows_of)[4]) {
    for (size_t i = 0; i < 4; ++i) rows_of[i] = w + std::min(n + i, last - 1) * depth;
  };
  auto take = [&](size_t m, size_t n, size_t last, const float (&sums)[4]) {
    for (size_t i = 0; i < 4 && n + i < last; ++i) kernels::narrow(sums[i], y[m * width + n + i]);
  };
  return products<T>(context, wide, rows, depth, width, 4, four, take);
}

// X [..., H], gate [k, H], up [k, H] -> silu(X gate^T) * (X up^T) [..., k]
template <class T>
OrtStatus* compact_swiglu(OrtKernelContext* context) {
  const Tensor x = ort::input(context, 0), gate = ort::input(context, 1), up = ort::input(context, 2);
  if (auto* error = ort::first_error({&x, &gate, &up})) return error;
  if (x.rank < 1 || gate.rank != 2 || up.rank != 2 || gate.last() != x.last() || up.last() != x.last() ||
      gate.shape[0] != up.shape[0])
    return ort::invalid("pp_fx.CompactSwiGLU: X [..., H], gate [k, H] and up [k, H] do not fit each other");
  const size_t depth = x.last(), rows = x.rows(), width = static_cast<size_t>(gate.shape[0]);
  void* out = nullptr;
  if (auto* error = ort::output_like(context, x, width, &out)) return error;
  if (!rows || !width) return nullptr;
  std::vector<float> room;
  const float* wide = floats(static_cast<const T*>(x.data), rows * depth, room);
  const T *g = static_cast<const T*>(gate.data), *u = static_cast<const T*>(up.data);
  T* y = static_cast<T*>(out);
  auto four = [&](size_t n, size_t last, const T* (&rows_of)[4]) {
    const size_t second = std::min(n + 1, last - 1);
    rows_of[0] = g + n * depth, rows_of[1] = g + second * depth;
    rows_of[2] = u + n * depth, rows_of[3] = u + second * depth;
  };
  auto take = [&](size_t m, size_t n, size_t last, const float (&sums)[4]) {
    for (size_t i = 0; i < 2 && n + i < last; ++i)
      kernels::narrow(sums[i] / (1 + std::exp(-sums[i])) * sums[2 + i], y[m * width + n + i]);
  };
  return products<T>(context, wide, rows, depth, width, 2, four, take);
}

// X [..., k], weight [k, H] -> X weight [..., H]
template <class T>
OrtStatus* compact_output(OrtKernelContext* context) {
  const Tensor x = ort::input(context, 0), weight = ort::input(context, 1);
  if (auto* error = ort::first_error({&x, &weight})) return error;
  if (x.rank < 1 || weight.rank != 2 || static_cast<size_t>(weight.shape[0]) != x.last())
    return ort::invalid("pp_fx.CompactOutput: X [..., k] and weight [k, H] do not fit each other");
  const size_t depth = x.last(), rows = x.rows(), width = weight.last();
  void* out = nullptr;
  if (auto* error = ort::output_like(context, x, width, &out)) return error;
  if (!rows || !width) return nullptr;
  std::vector<float> room;
  const float* wide = floats(static_cast<const T*>(x.data), rows * depth, room);
  const T* w = static_cast<const T*>(weight.data);
  // slices of the sum, not of the columns: each task reads its rows of the weight from end to end
  const size_t size = rows * width, most = std::clamp<size_t>(kPartialSums / size, 1, kMaxSlices);
  const size_t slices = std::clamp<size_t>(depth / kSliceOfTask, 1, most);
  std::vector<float> partial(slices * size);
  auto task = [&](size_t index) {
    for (size_t top = 0; top < rows; top += kRowsOfX)
      kernels::add_rows(w, wide + top * depth, partial.data() + index * size + top * width,
                        std::min(kRowsOfX, rows - top), depth, width, index * depth / slices,
                        (index + 1) * depth / slices);
  };
  if (auto* error = ort::parallel_for(context, slices, task)) return error;
  T* y = static_cast<T*>(out);
  for (size_t i = 0; i < size; ++i) {
    float total = 0;
    for (size_t slice = 0; slice < slices; ++slice) total += partial[slice * size + i];
    kernels::narrow(total, y[i]);
  }
  return nullptr;
}

// strength fp32 [N, C], factor [N, C], and X [N, H], up [C, H], up_bias [C] if `gated`; down [C, O], count int64 [1]:
// see Strongest and StrongestOutput -> [N, O]
template <class T, bool gated>
OrtStatus* strongest(OrtKernelContext* context) {
  const Tensor strength = ort::input(context, 0), factor = ort::input(context, 1);
  const Tensor x = ort::input(context, gated ? 2 : 1), up = ort::input(context, gated ? 3 : 1);
  const Tensor bias = ort::input(context, gated ? 4 : 1), down = ort::input(context, gated ? 5 : 2);
  const Tensor count = ort::input(context, gated ? 6 : 3);
  if (auto* error = ort::first_error({&strength, &factor, &x, &up, &bias, &down, &count})) return error;
  bool fits = strength.rank == 2 && factor.rank == 2 && down.rank == 2 && count.rank == 1 && count.shape[0] == 1 &&
              factor.shape[0] == strength.shape[0] && factor.shape[1] == strength.shape[1] &&
              down.shape[0] == strength.shape[1];
  if (gated)
    fits = fits && x.rank == 2 && up.rank == 2 && bias.rank == 1 && x.shape[0] == strength.shape[0] &&
           up.shape[0] == strength.shape[1] && bias.shape[0] == strength.shape[1] && up.shape[1] == x.shape[1];
  if (!fits) return ort::invalid("pp_fx.Strongest: strength, factor, X, up, up_bias, down do not fit each other");
  const size_t tokens = strength.rows(), channels = strength.last(), width = down.last();
  const int64_t asked = *static_cast<const int64_t*>(count.data);
  if (asked < 1 || static_cast<size_t>(asked) > channels)
    return ort::invalid("pp_fx.Strongest: count and the number of channels do not fit each other");
  const int64_t shape[] = {strength.shape[0], down.shape[1]};
  void* out = nullptr;
  if (auto* error = ort::output(context, shape, 2, &out)) return error;
  if (!tokens || !width) return nullptr;
  auto of = [](const Tensor& t) { return static_cast<const T*>(t.data); };
  OrtStatus* failed = nullptr;
  auto parallel_for = [&](size_t tasks, auto task) { failed = ort::parallel_for(context, tasks, task); };
  const kernels::Matrix<T> rows = {gated ? of(up) : nullptr, up.last(), up.last()}, columns = {of(down), width, width};
  const T *up_bias = gated ? of(bias) : nullptr, *no_bias = nullptr;
  kernels::strongest<T>(static_cast<const float*>(strength.data), of(factor), of(x), rows, up_bias, columns, no_bias,
                        static_cast<T*>(out), tokens, channels, asked, ort::kTasksOfStep, parallel_for);
  return failed;
}

// A [n, n] symmetric positive definite, B [n, m] -> A^-1 B
OrtStatus* solve(OrtKernelContext* context) {
  const Tensor a = ort::input(context, 0), b = ort::input(context, 1);
  if (auto* error = ort::first_error({&a, &b})) return error;
  if (a.rank != 2 || b.rank != 2 || a.shape[0] != a.shape[1] || a.shape[0] != b.shape[0])
    return ort::invalid("pp_fx.Solve: A [n, n] and B [n, m] do not fit each other");
  const size_t n = static_cast<size_t>(a.shape[0]), width = b.last();
  void* out = nullptr;
  if (auto* error = ort::output(context, b.shape, b.rank, &out)) return error;
  if (!n || !width) return nullptr;
  const float* matrix = static_cast<const float*>(a.data);
  std::vector<float> factor(matrix, matrix + n * n);
  float* y = static_cast<float*>(out);
  if (!kernels::cholesky(factor.data(), n)) {  // as in torch, numbers that cannot be computed are not a number
    std::fill(y, y + n * width, NAN);
    return nullptr;
  }
  std::copy_n(static_cast<const float*>(b.data), n * width, y);
  auto task = [&](size_t index) {
    kernels::solve_columns(factor.data(), y, n, width, index * kColumnsOfTask,
                           std::min(width, (index + 1) * kColumnsOfTask));
  };
  return ort::parallel_for(context, (width + kColumnsOfTask - 1) / kColumnsOfTask, task);
}

struct Op : OrtCustomOp {
  const char* name;
  std::vector<int> inputs;  // types
  int type;                 // of the output
  OrtStatus* (*compute)(OrtKernelContext*);

  Op(const char* name, std::vector<int> inputs, int type, OrtStatus* (*compute)(OrtKernelContext*))
      : OrtCustomOp{}, name(name), inputs(inputs), type(type), compute(compute) {
    version = ort::kCustomOpVersion;
    GetName = [](const OrtCustomOp* op) { return self(op)->name; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputType = [](const OrtCustomOp* op, size_t index) { return self(op)->inputs[index]; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return self(op)->inputs.size(); };
    GetOutputType = [](const OrtCustomOp* op, size_t) { return self(op)->type; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetInputCharacteristic = GetOutputCharacteristic = GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernel = [](const OrtCustomOp* op, const void*, const void*) { return mutable_self(op); };
    CreateKernelV2 = [](const OrtCustomOp* op, const void*, const void*, void** kernel) -> OrtStatus* {
      *kernel = mutable_self(op);
      return nullptr;
    };
    KernelCompute = [](void*, OrtKernelContext*) {};  // not called where the one below is there
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
      try {
        return static_cast<Op*>(kernel)->compute(context);
      } catch (const std::bad_alloc&) {
        return ort::invalid("pp_fx: out of memory");
      }
    };
    KernelDestroy = [](void*) {};
  }

  static const Op* self(const OrtCustomOp* op) { return static_cast<const Op*>(op); }
  static void* mutable_self(const OrtCustomOp* op) { return const_cast<Op*>(self(op)); }
};

template <class T>
std::vector<Op> ops_of(int type) {
  const int strength = ort::kFloat, count = ort::kInt64;
  return {{"CompactLinear", {type, type}, type, compact_linear<T>},
          {"CompactSwiGLU", {type, type, type}, type, compact_swiglu<T>},
          {"CompactOutput", {type, type}, type, compact_output<T>},
          {"Strongest", {strength, type, type, type, type, type, count}, type, strongest<T, true>},
          {"StrongestOutput", {strength, type, type, count}, type, strongest<T, false>}};
}

std::vector<Op>& all_ops() {
  static std::vector<Op> ops = [] {
    const int real = ort::kFloat, codes = ort::kUInt8, bytes = ort::kInt8, index = ort::kInt64;
    std::vector<Op> found = {
        {"Solve", {real, real}, real, solve},
        {"QuantizedRows", {real, codes, real, index}, real, quantized_ops::rows},
        {"QuantizedOutput", {real, bytes, real}, real, quantized_ops::output},
        {"QuantizedStrongest", {real, real, real, codes, real, real, bytes, real, index}, real, quantized_ops::strongest<true>},
        {"QuantizedStrongestOutput", {real, real, bytes, real, index}, real, quantized_ops::strongest<false>}};
    for (auto& more : {ops_of<float>(ort::kFloat), ops_of<kernels::Half>(ort::kFloat16),
                       ops_of<kernels::BFloat16>(ort::kBFloat16)})
      found.insert(found.end(), more.begin(), more.end());
    return found;
  }();
  return ops;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) const char* pp_fx_ops_version() { return PP_FX_VERSION; }

// What a session calls: SessionOptions.register_custom_ops_library, OrtApi::RegisterCustomOpsLibrary.
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  ort::api = base->GetApi(ort::kApiVersion);
  if (!ort::api) {  // an onnxruntime before 1.18: its oldest table can still say so
    ort::api = base->GetApi(1);
    return ort::invalid("pp_fx: the operator library needs onnxruntime 1.18 or later");
  }
  OrtCustomOpDomain* domain = nullptr;
  const char* name = "pp_fx";
  if (auto* error = ort::call<OrtStatus*>(ort::kCreateCustomOpDomain, name, &domain)) return error;
  for (Op& op : all_ops()) {
    const OrtCustomOp* given = &op;
    if (auto* error = ort::call<OrtStatus*>(ort::kCustomOpDomainAdd, domain, given)) return error;
  }
  return ort::call<OrtStatus*>(ort::kAddCustomOpDomain, options, domain);
}
}
