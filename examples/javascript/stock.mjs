// node stock.mjs FOLDER "text" [NEW_TOKENS]: the same folder in transformers.js, which knows nothing of pruning: the
// prompt is pruned, decoding is dense.

import { resolve, dirname, basename } from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const [folder, text, count = "20"] = process.argv.slice(2);
if (text === undefined) {
  console.error('usage: node stock.mjs FOLDER "text" [NEW_TOKENS]');
  process.exit(2);
}
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const name = basename(resolve(folder));
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, {
  subfolder: "",
  dtype: "fp32",
  use_external_data_format: true,
  session_options: { logSeverityLevel: 3 },
});
const inputs = tokenizer(text);
const ids = await model.generate({ ...inputs, max_new_tokens: Number(count), do_sample: false });
console.log(tokenizer.batch_decode(ids, { skip_special_tokens: true })[0]);
process.exit(0);
