// node node.mjs FOLDER "The quick brown fox" [NEW_TOKENS]: text of an exported folder, under onnxruntime-node.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";
import { generate } from "./generate.mjs";

const [folder, text, count = "20"] = process.argv.slice(2);
if (text === undefined) {
  console.error('usage: node node.mjs FOLDER "text" [NEW_TOKENS]');
  process.exit(2);
}
const json = async (name) => JSON.parse(await readFile(join(folder, name), "utf8"));
const tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
const session = await ort.InferenceSession.create(join(folder, "model_stateful.onnx"), { logSeverityLevel: 3 });
const prompt = tokenizer.encode(text).ids;
const made = [];
for await (const id of generate(ort, session, prompt, Number(count))) made.push(id);
console.log(tokenizer.decode([...prompt, ...made], { skip_special_tokens: true }));
