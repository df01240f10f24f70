"""`check`: onnxruntime against torch, both phases, on random prompts."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxscript import ir
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ..capture.layers import find_layers
from ..config import ProbePruningConfig
from ..errors import ExportError
from ..process_settings import own_defaults
from ..rewrite.layer import layers_of, settings_of
from ..rewrite.transform import transform
from ..runtime.modes import auto_steps, guard_lifted, history_frozen
from ..runtime.selections import selections_on
from .folder import MODEL, check_files, context_length, read_settings
from .names import COMPACT, HISTORY, of_group, state_tensor
from .ort_model import OrtModel
from .ports import Port, homes, ports_of
from .providers import CPU, check_provider
from .quantized_weights import widened

_TOLERANCE = {"float32": 1e-3, "float16": 5e-2}
_AGREEMENT = 0.99
_ROWS = 512
"""Logits of so many tokens are compared; those of the longest batch alone would take gigabytes."""


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        difference: largest difference of a logit at a real token, over the largest logit (at least 1), of the prompts
            for which both chose the same units: near-ties may fall otherwise. Infinite where there is no such prompt.
            Steps that choose do so for each sequence and do not tell what: there it is the median of the sequences.
        agreement: share of the kept units that both chose.
        tolerance: of `difference`, by the dtype.
        prompts: how many prompts were compared.
    """

    difference: float
    agreement: float
    tolerance: float
    prompts: int

    @property
    def passed(self) -> bool:
        """Logits within the tolerance, and at least 99% of the units the same."""
        return self.difference <= self.tolerance and self.agreement >= _AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types."""
        return {**asdict(self), "passed": self.passed}

    def require(self) -> None:
        """Raises:

        ExportError: the comparison failed.
        """
        if not self.passed:
            raise ExportError(
                f"onnxruntime and torch differ: logits by {self.difference:.2e} (allowed {self.tolerance:.0e}), kept "
                f"units agree at {self.agreement:.2%}; report this with the model's configuration"
            )


@own_defaults()
def check(directory: str | Path, *, seed: int = 0, provider: str = CPU) -> Check:
    """Compare the logits and kept units of an exported folder under onnxruntime with torch.

    The torch model is rebuilt from the folder: configuration, weights and history lie in it. Prompts are random: a
    single short one, a batch with left padding, a batch long enough for every compensation; then three decode steps.

    Args:
        directory: what `pp_fx.export.onnx` has written.
        seed: of the random tokens.
        provider: of onnxruntime, as in `OrtModel.from_pretrained`.

    Raises:
        InputError: this onnxruntime has no such provider.
        ExportError: the folder is damaged or not one of ours. A failed comparison does not raise, see `Check.passed`.
    """
    check_provider(provider)
    directory = Path(directory)
    check_files(directory)
    return compare_with_torch(directory, *_rebuild(directory), seed, provider)


def compare_with_torch(directory: Path, model: Any, ports: list[Port], seed: int = 0, provider: str = CPU) -> Check:
    """As `check`, against a transformed model in memory, which is left as it is, and its ports."""
    frugal = onnxruntime.SessionOptions()  # the weights once, not a second time in the kernels' own layout
    frugal.enable_cpu_mem_arena = False
    frugal.add_session_config_entry("session.disable_prepacking", "1")
    if read_settings(directory).get("weights") is None:
        ours = OrtModel.from_pretrained(directory, session_options=frugal, provider=provider)
    else:
        ours = _unrounded(directory, frugal, provider)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    longest = context_length(model.config) - 4
    same, units, shapes = 0, 0, _shapes(settings_of(model), longest)
    prompts, steps = [], []  # the largest difference of each sequence; a near-tie of a step shows in its sequence alone
    choose = any(state.steps for layer in layers_of(model) for state in layer.states().values())
    fewest = settings_of(model).min_select_tokens  # a call of fewer tokens is a step
    for batch, length in shapes:
        ids = torch.randint(0, vocabulary, (batch, length + 3), generator=generator)
        mask = torch.ones_like(ids)
        if batch > 1:
            mask[0, : length // 4] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, ort_cache = DynamicCache(), None
        prompt, step = torch.zeros(batch), torch.zeros(batch)
        cuts = [(0, length), *((length + i, length + i + 1) for i in range(3))]
        layers = layers_of(model)
        modes = history_frozen(model), guard_lifted(layers), auto_steps(layers)
        with torch.no_grad(), modes[0], modes[1], modes[2], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for start, stop in cuts:
                last = max(start, stop - max(1, _ROWS // batch))
                given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
                part = ids[:, start:stop].to(model.device)
                moved = {k: v.to(model.device) for k, v in given.items()}
                keep = {"logits_to_keep": stop - last}
                expected = model(part, past_key_values=cache, use_cache=True, **moved, **keep).logits.float().cpu()
                out: Any = ours(ids[:, start:stop], past_key_values=ort_cache, **given, **keep)
                ort_cache = out.past_key_values
                real = mask[:, last:stop].bool()
                scale = expected[real].abs().max().clamp(min=1)
                found = ((out.logits.float() - expected).abs().amax(-1) / scale).masked_fill(~real, 0).amax(1)
                phase = step if choose and stop - start < fewest else prompt
                torch.maximum(phase, found, out=phase)
        chosen: Any = selections_on(cache)
        agrees = True
        for port in (p for p in ports if p.travels):
            torch_kept = chosen.layers[port.index][port.kind].kept.cpu().numpy()
            ort_kept = ort_cache.compact[of_group(COMPACT, port.name, "kept")].numpy()  # type: ignore[union-attr]
            agrees &= bool(np.array_equal(torch_kept, ort_kept))
            same += len(np.intersect1d(torch_kept, ort_kept))
            units += len(torch_kept)
        if agrees:
            prompts.append(prompt)
            steps.append(step)
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    difference = torch.maximum(torch.cat(prompts).max(), torch.cat(steps).median()).item() if prompts else math.inf
    return Check(difference, same / units if units else 1.0, _TOLERANCE[dtype], len(shapes))


def _unrounded(directory: Path, options: Any, provider: str) -> OrtModel:
    """The folder's graph with products in fp32, which elsewhere round their inputs to 8 bits: all else has to agree."""
    graph = ir.load(directory / MODEL)
    for node in ir.traversal.RecursiveGraphIterator(graph.graph):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    model = ir.serde.serialize_model(graph).SerializeToString()
    return OrtModel.from_pretrained(
        directory, session_options=options, provider=provider, ops_library=None, graph=model
    )


def _shapes(settings: ProbePruningConfig, longest: int) -> list[tuple[int, int]]:
    """Batch and length of the prompts; lengths no larger than the model allows."""
    long = min(longest, settings.min_select_tokens + 9)
    return [(1, min(longest, 5)), (2, long), (1 + (settings.compensation_min_tokens or 0) // long, long)]


def _rebuild(directory: Path) -> tuple[Any, list[Port]]:
    """The transformed torch model out of an exported folder, and its ports."""
    settings = read_settings(directory)
    stored = ir.load(directory / MODEL).graph.initializers
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory), dtype=getattr(torch, settings["dtype"])
    ).eval()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transform(model, ProbePruningConfig.from_dict({**settings["config"], "guard": False}))
    path, _ = find_layers(model)
    ports = ports_of(model)
    moved = homes(path, ports)

    def tensor(name: str) -> torch.Tensor | None:
        if f"{name}.codes" in stored:
            parts = [stored[f"{name}.{part}"].const_value for part in ("codes", "scales")]
            return widened(*(torch.from_numpy(part.numpy().copy()) for part in parts))  # type: ignore[union-attr]
        value = stored.get(moved.get(name, name))
        if value is None:
            return None
        array = value.const_value.numpy()  # type: ignore[union-attr]
        found = torch.from_numpy((array.view(np.int16) if array.dtype.name == "bfloat16" else array).copy())
        found = found.view(torch.bfloat16) if array.dtype.name == "bfloat16" else found
        return found.flatten(0, 1) if name in moved and found.ndim == 3 else found

    weights = {}
    for name, parameter in model.named_parameters():
        found, turned = tensor(name), tensor(f"{name}.T")
        found = turned.t() if found is None and turned is not None else found
        if found is not None and found.shape != parameter.shape:
            raise ExportError(
                f"{directory / MODEL} holds {name} as {tuple(found.shape)}, config.json says "
                f"{tuple(parameter.shape)}: a model with layers of unlike sizes cannot be rebuilt from a folder; its "
                "export was compared with the model in memory (verify=True)"
            )
        if found is None:
            raise ExportError(f"{directory / MODEL} does not hold the weight {name}; export the model again")
        weights[name] = found
    model.load_state_dict(weights, strict=False)  # tied weights have one name here
    with torch.no_grad():
        for port in ports:
            for key, buffer in port.state.history().items():
                found = tensor(of_group(HISTORY, port.name, key))
                found = tensor(f"{path}.{port.index}.{state_tensor(port.kind, key)}") if found is None else found
                if found is not None:
                    buffer.copy_(found.to(buffer.dtype))
            port.state.calibrated = settings["calibrated"]
    return model, ports
