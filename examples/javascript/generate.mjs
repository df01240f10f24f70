// Greedy generation on model_stateful.onnx with any onnxruntime for JavaScript (`ort`: onnxruntime-node or -web).
//
// The prompt's call gets empty compact weights and selects; every later call is given what the prompt returned, so it
// reads the selected channels alone.

const ints = (ort, numbers, shape) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), shape);

/** No past and no selection: tensors of the declared types whose variable dimensions are 0 (batch: 1). */
export function emptyState(ort, session) {
  const state = {};
  for (const { name, type, shape } of session.inputMetadata) {
    if (!/^(past_key_values|pp_compact)\./.test(name)) continue;
    const sizes = shape.map((size) => (typeof size === "number" ? size : size === "batch_size" ? 1 : 0));
    const count = sizes.reduce((a, b) => a * b, 1);
    const data = type === "int64" ? new BigInt64Array(count) : new Float32Array(count);
    state[name] = new ort.Tensor(type, data, sizes);
  }
  return state;
}

/** One call: logits of the last token, and the state for the next call. */
export async function step(ort, session, ids, state) {
  const past = state[Object.keys(state).find((name) => name.startsWith("past_key_values."))].dims[2];
  const out = await session.run({
    input_ids: ints(ort, ids, [1, ids.length]),
    attention_mask: ints(ort, Array(past + ids.length).fill(1), [1, past + ids.length]),
    position_ids: ints(ort, ids.map((_, i) => past + i), [1, ids.length]),
    num_logits_to_keep: ints(ort, [1], []),
    ...state,
  });
  const selected = Object.keys(out).some((name) => name.startsWith("present_compact.") && name.endsWith(".kept") && out[name].dims[0]);
  const next = {};
  for (const name of Object.keys(state)) {
    const made = out[name.replace("past_key_values.", "present.").replace("pp_compact.", "present_compact.")];
    next[name] = name.startsWith("past_key_values.") || selected ? made : state[name];
  }
  return { logits: out.logits.data, state: next };
}

/** Token ids, one by one, until `count` of them or the end token. */
export async function* generate(ort, session, prompt, count, end = null) {
  let state = emptyState(ort, session);
  let ids = prompt;
  for (let made = 0; made < count; made++) {
    const out = await step(ort, session, ids, state);
    state = out.state;
    const token = out.logits.reduce((best, value, i, all) => (value > all[best] ? i : best), 0);
    if (token === end) return;
    yield token;
    ids = [token];
  }
}
