/* Greedy generation on an exported folder from C: token ids in, token ids out.
 *
 *   cc -O2 generate.c -o generate -ldl
 *   ./generate libonnxruntime.so FOLDER/model.onnx NEW_TOKENS [--ops LIBRARY] ID ID ID ...
 *
 * The prompt selects; its `present_compact.*` go back in as `pp_compact.*`, so decoding reads the kept weights alone.
 * LIBRARY is what `pp-fx build-ort-ops` has built: with it decoding is faster. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ort.h"

enum { kMaxNames = 8192 };

static void check(void* status) {
  if (!status) return;
  fprintf(stderr, "onnxruntime: %s\n", GetErrorMessage(status));
  exit(1);
}

static void* memory;

static void* tensor(void* data, size_t bytes, const int64_t* shape, size_t rank, int type) {
  void* value = NULL;
  check(CreateTensorWithDataAsOrtValue(memory, data, bytes, shape, rank, type, &value));
  return value;
}

/* `present.3.key` -> `past_key_values.3.key`, `present_compact.3.mlp.up` -> `pp_compact.3.mlp.up`, others: NULL. */
static char* next_input(const char* output) {
  char* name = malloc(strlen(output) + 16);
  if (!strncmp(output, "present.", 8)) sprintf(name, "past_key_values.%s", output + 8);
  else if (!strncmp(output, "present_compact.", 16)) sprintf(name, "pp_compact.%s", output + 16);
  else { free(name); return NULL; }
  return name;
}

int main(int argc, char** argv) {
  const char* ops = NULL;
  int first = 4;
  if (argc > 5 && !strcmp(argv[4], "--ops")) { ops = argv[5]; first = 6; }
  if (argc <= first) {
    fprintf(stderr, "usage: %s LIBONNXRUNTIME MODEL NEW_TOKENS [--ops LIBRARY] ID ...\n", argv[0]);
    return 2;
  }
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) { fprintf(stderr, "%s\n", dlerror()); return 1; }
  const OrtApiBase* base = ((const OrtApiBase* (*)(void))dlsym(library, "OrtGetApiBase"))();
  ort_api = base->GetApi(kApiVersion);
  if (!ort_api) { fprintf(stderr, "onnxruntime %s is older than 1.18\n", base->GetVersionString()); return 1; }

  void *environment, *options, *session, *allocator, *handle = NULL;
  check(CreateEnv(3, "generate", &environment));
  check(CreateSessionOptions(&options));
  if (ops) check(RegisterCustomOpsLibrary(options, ops, &handle));
  check(CreateSession(environment, argv[2], options, &session));
  check(CreateCpuMemoryInfo(0, 0, &memory));
  check(GetAllocatorWithDefaultOptions(&allocator));

  size_t inputs, outputs;
  check(SessionGetInputCount(session, &inputs));
  check(SessionGetOutputCount(session, &outputs));
  char* output_names[kMaxNames];
  if (inputs + outputs > kMaxNames) { fprintf(stderr, "too many inputs and outputs\n"); return 1; }
  for (size_t i = 0; i < outputs; ++i) check(SessionGetOutputName(session, i, allocator, &output_names[i]));

  /* what is fed: tokens, mask, positions, how many logits, whether to select; then keys, values and the selection */
  const char* names[kMaxNames] = {"input_ids", "attention_mask", "position_ids", "num_logits_to_keep", "pp_min_select_tokens"};
  void* values[kMaxNames] = {NULL};
  enum { kFixed = 5 };
  size_t fed = kFixed;
  for (size_t i = 0; i < inputs; ++i) {
    char* name;
    check(SessionGetInputName(session, i, allocator, &name));
    if (strncmp(name, "past_key_values.", 16)) continue;
    void* type;
    const void* info;
    int64_t shape[4];
    static float nothing[1];
    check(SessionGetInputTypeInfo(session, i, &type));
    check(CastTypeInfoToTensorInfo(type, &info));
    check(GetDimensions(info, shape, 4));
    ReleaseTypeInfo(type);
    shape[0] = 1;
    shape[2] = 0;
    names[fed] = name;
    values[fed++] = tensor(nothing, 0, shape, 4, kFloat);
  }

  const int count = atoi(argv[3]), prompt = argc - first, room = prompt + count;
  int64_t *ids = malloc((room + 1) * sizeof *ids), *mask = malloc(room * sizeof *mask), *positions = malloc(room * sizeof *positions);
  for (int i = 0; i < room; ++i) { mask[i] = 1; positions[i] = i; }
  for (int i = 0; i < prompt; ++i) ids[i] = atoll(argv[first + i]);

  int64_t one = 1, select = 1, never = INT64_MAX;
  for (int made = 0, past = 0, length = prompt; made < count; ++made) {
    const int64_t tokens[2] = {1, length}, all[2] = {1, past + length};
    values[0] = tensor(ids + past, length * sizeof *ids, tokens, 2, kInt64);
    values[1] = tensor(mask, (past + length) * sizeof *mask, all, 2, kInt64);
    values[2] = tensor(positions + past, length * sizeof *positions, tokens, 2, kInt64);
    values[3] = tensor(&one, sizeof one, NULL, 0, kInt64);
    values[4] = tensor(past ? &never : &select, sizeof select, NULL, 0, kInt64);
    void** results = calloc(outputs, sizeof *results);
    check(Run(session, NULL, names, (const void* const*)values, fed, (const char* const*)output_names, outputs, results));
    for (int i = 0; i < kFixed; ++i) ReleaseValue(values[i]);

    float* logits = NULL;
    void* info = NULL;
    int64_t shape[3] = {0};
    for (size_t i = 0; i < outputs; ++i) {
      if (!strcmp(output_names[i], "logits")) {
        check(GetTensorMutableData(results[i], (void**)&logits));
        check(GetTensorTypeAndShape(results[i], &info));
        check(GetDimensions(info, shape, 3));
        ReleaseTensorTypeAndShapeInfo(info);
      }
    }
    int64_t best = 0;
    for (int64_t i = 1; i < shape[2]; ++i) if (logits[i] > logits[best]) best = i;

    for (size_t i = 0; i < outputs; ++i) { /* what goes back in replaces what was there */
      char* name = next_input(output_names[i]);
      const int compact = name && !strncmp(name, "pp_compact.", 11);
      if (!name || (compact && past)) { ReleaseValue(results[i]); free(name); continue; }
      size_t place = kFixed;
      while (place < fed && strcmp(names[place], name)) ++place;
      if (place < fed) { ReleaseValue(values[place]); free(name); } else { names[fed++] = name; }
      values[place] = results[i];
    }
    free(results);
    past += length;
    length = 1;
    ids[past] = best;
    printf("%lld%c", (long long)best, made + 1 < count ? ' ' : '\n');
    fflush(stdout);
  }
  return 0;
}
