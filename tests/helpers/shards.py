"""What the checks of tensor parallel models share: loading, configurations, token ids."""

import warnings

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import pp_fx

SEPARABLE = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, mlp_compensation="mean", attention_score=None,
    decode="sticky", probe=pp_fx.ProbeConfig(ranking="residual", token_fraction=0.2),
)  # fmt: skip
"""One process can make the same choice: no score and no compensation looks at two channels together."""
JOINT = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, compensation_min_tokens=64, decode="sticky",
    compensation_rank=12,
)  # fmt: skip
IDS = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(2, 97, (5, 40), generator=torch.Generator().manual_seed(1))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""transformers' own test of tensor parallel logits (tests/test_tensor_parallel_mixin.py)."""
PLANS = {
    "OPT": {"model.decoder.layers.*.fc1": "colwise", "model.decoder.layers.*.fc2": "rowwise"},
}  # transformers has none of its own for it


def load(folder, plan="auto"):
    """The tensor parallel model of a folder."""
    config = DistributedConfig(tp_plan=plan, tp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, local_files_only=True).eval()


def transformed(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pp_fx.transform(model, config)


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def save(model, folder):
    """Written by one rank, read by all."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
