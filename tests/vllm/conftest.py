"""Tiny folders and engines; all is skipped where vLLM is missing (`make vllm` has an environment for it)."""

import contextlib
import os

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pp_fx

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "LRU_CACHE_CAPACITY": "8",  # else oneDNN and torch keep what they compile for each of a thousand shapes, and memory
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",  # grows without us, too
}
SETTINGS = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=16, decode="dense")
IDS = torch.randint(2, 197, (64, 96), generator=torch.Generator().manual_seed(3))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "vllm":
            item.add_marker(pytest.mark.vllm)


def tiny(seed=0):
    """A random Llama of three layers in fp32, with heads as vLLM has kernels for."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=199, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=192, max_position_embeddings=512, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model


def calibrated(config=SETTINGS, seed=0):
    """The same, transformed and calibrated."""
    model = pp_fx.transform(tiny(seed), config)
    return pp_fx.calibrate(model, IDS[:8].flip(1), progress=False)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    tiny().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def pruned_folder(tmp_path_factory):
    """With a tokenizer of one token a character."""
    path = tmp_path_factory.mktemp("pruned")
    calibrated().save_pretrained(path)
    letters = {c: i for i, c in enumerate(["<unk>", *(chr(c) for c in range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def engine(folder, **options):
    """vLLM on a folder without a tokenizer; `pruning`: fields of `quantization_config`."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    pruning = options.pop("pruning", None)
    if pruning is not None:
        options |= {
            "quantization": "pp_fx",
            "hf_overrides": {"quantization_config": {"quant_method": "pp_fx", **pruning}},
        }
    made = None
    try:
        made = LLM(folder, **{
            "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True,
            "enable_prefix_caching": False, "max_num_seqs": 16, "seed": 0, **options,
        })  # fmt: skip
        yield made
    finally:
        if made is not None:
            made.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def generate(llm, ids, count=8, prompt_logprobs=None):
    """Greedy; ids is a list of lists or a tensor [N, T]."""
    from vllm import SamplingParams

    rows = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    sampling = SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, prompt_logprobs=prompt_logprobs
    )
    return llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)


def tokens(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def steps_of(llm):
    """The counts of the engine's steps."""
    return llm.llm_engine.vllm_config.quant_config.steps


def logprobs(outputs):
    """Of every prompt's tokens but the first."""
    return torch.tensor(
        [
            [found[token].logprob for found, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)]
            for o in outputs
        ]
    )


def expected(model, ids, count):
    """What transformers makes of the prompts one after another: log probabilities [N, T - 1], greedy tokens."""
    found, made = [], []
    with torch.no_grad():
        for row in ids:
            cache = DynamicCache(config=model.config)
            logits = model(row[None], past_key_values=cache).logits[0]
            found.append(logits[:-1].log_softmax(-1).gather(1, row[1:, None])[:, 0])
            made.append([int(logits[-1].argmax())])
            for _ in range(count - 1):
                logits = model(torch.tensor([[made[-1][-1]]]), past_key_values=cache).logits[0]
                made[-1].append(int(logits[-1].argmax()))
    return torch.stack(found), made
