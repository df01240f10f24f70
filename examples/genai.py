"""An exported folder in onnxruntime-genai, which knows nothing of pruning: the prompt is pruned, decoding is dense.

python examples/genai.py FOLDER "The quick brown fox" [NEW_TOKENS] [--ids]
"""

import argparse

import onnxruntime_genai as og


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("count", type=int, nargs="?", default=20)
    parser.add_argument("--ids", action="store_true", help="print the new token ids in place of the text")
    options = parser.parse_args()
    model = og.Model(options.folder)
    tokenizer = og.Tokenizer(model)
    prompt = tokenizer.encode(options.text)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + options.count, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    made = generator.get_sequence(0)
    print(" ".join(map(str, made[len(prompt) :])) if options.ids else tokenizer.decode(made))


if __name__ == "__main__":
    main()
