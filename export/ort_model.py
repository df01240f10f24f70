"""`OrtModel`: an exported folder under onnxruntime, with transformers' own `generate()`.

A prompt selects; what it selected stays on the cache as compact weights in onnxruntime's memory, and decoding feeds
them back, together with keys and values, without copying them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..checks import check_ids, check_integers
from ..errors import ExportError, InputError, StateError
from .folder import MODEL, check_files, read_settings
from .names import (
    COMPACT,
    HISTORY,
    INPUT_IDS,
    KEEP_LOGITS,
    LOGITS,
    MASK,
    MIN_SELECT,
    PAST,
    POSITIONS,
    PRESENT,
    input_of,
    of_kind,
    output_of,
)
from .native_ops import check_library, find_ort_ops
from .ort_cache import OrtCache, ort_value
from .providers import CPU, CUDA, check_provider

_ALWAYS, _NEVER = np.array(1, np.int64), np.array(np.iinfo(np.int64).max, np.int64)


class OrtModel(GenerationMixin):
    """A causal language model whose forward pass runs in onnxruntime.

    ```python
    model = pp_fx.export.OrtModel.from_pretrained("out/")
    model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
    ```

    Attributes:
        history: input name -> OrtValue of the history in use; updated by every call that selects while
            `updates_history` is set.
        reuses: decoding runs the prompt's selection (False: all units, decode="dense").
        steps: decoding tokens choose for themselves (decode="step"): short calls do so, first ones too.
        updates_history: feed the history back (False: it stays as exported).
    """

    main_input_name = "input_ids"
    _is_stateful = False
    _supports_cache_class = True
    input_modalities = ("text",)

    def __init__(
        self,
        session: Any,
        config: Any,
        generation_config: Any,
        min_select_tokens: int,
        reuses: bool = True,
        steps: bool = False,
    ) -> None:
        self.session, self.config, self.generation_config = session, config, generation_config
        self.min_select_tokens, self.reuses, self.steps = min_select_tokens, reuses, steps
        self.device = torch.device("cpu")
        self._memory = "cuda" if session.get_providers()[0] == CUDA else "cpu"
        self.updates_history = False
        self.history: dict[str, Any] = {}
        self._inputs = {i.name: i for i in session.get_inputs()}
        outputs = [o.name for o in session.get_outputs()]
        optional = {i.name for i in session.get_overridable_initializers()}
        self._compact = [n for n in optional if of_kind(n, COMPACT)]
        self._history = [n for n in optional if of_kind(n, HISTORY)]
        self._present = [n for n in outputs if of_kind(n, PRESENT)]
        missing = {INPUT_IDS, MASK, POSITIONS} - set(self._inputs)
        if missing or LOGITS not in outputs:
            raise ExportError(f"{MODEL} lacks {', '.join(sorted(missing)) or LOGITS}; export the model again")

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        threads: int | None = None,
        provider: str | None = None,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        ops_library: str | Path | None = "auto",
        session_options: Any = None,
        graph: bytes | None = None,
    ) -> OrtModel:
        """Load a folder that `pp_fx.export.onnx` has written.

        Args:
            directory: the folder.
            threads: of onnxruntime inside one operator; None: its default (all cores).
            provider: short for `providers=(provider, "CPUExecutionProvider")`, for example "CUDAExecutionProvider"
                (`pp-fx[onnxruntime-gpu]`); what it has no kernel for runs on the CPU
                (`pp_fx.export.placement` lists it). Keys, values and the selection stay in its memory between calls.
            providers: onnxruntime's execution providers, the preferred one first.
            ops_library: native kernels of the `pp_fx` operators: "auto" takes the library that `build_ort_ops` has
                built, if it has; a path; None runs the operators' function bodies.
            session_options: onnxruntime.SessionOptions to start from.
            graph: a serialized graph to run in place of the folder's.

        Warns:
            A folder with quantized weights, and no native kernels were built.

        Raises:
            InputError: this onnxruntime has no such provider.
            ExportError: a file is missing or is not the one that was written, onnxruntime cannot load the model, or
                the library is not one of this version.
        """
        if provider is not None:
            providers = tuple(dict.fromkeys((provider, CPU)))
        for name in providers:
            check_provider(name)
        directory = Path(directory)
        check_files(directory)
        options = onnxruntime.SessionOptions() if session_options is None else session_options
        options.log_severity_level = 3  # one warning for each optional input otherwise
        if threads is not None:
            options.intra_op_num_threads = threads
        settings = read_settings(directory)
        library = find_ort_ops() if ops_library == "auto" else ops_library
        if library is None and ops_library == "auto" and settings.get("weights") is not None:
            warnings.warn(
                f"{directory} has weights in {settings['weights']}, and without native kernels a token takes several "
                "times as long; run pp-fx build-ort-ops once",
                stacklevel=2,
            )
        if library is not None:
            check_library(library)
            options.register_custom_ops_library(str(library))
        try:
            source = str(directory / MODEL) if graph is None else graph
            session = onnxruntime.InferenceSession(source, options, providers=list(providers))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise ExportError(f"onnxruntime cannot load {directory / MODEL} ({error})") from error
        config = AutoConfig.from_pretrained(directory)
        generation = GenerationConfig.from_pretrained(directory)
        decode = settings["config"]["decode"]
        return cls(
            session, config, generation, settings["min_select_tokens"], decode != "dense", decode in ("step", "auto")
        )

    def can_generate(self) -> bool:
        return True

    def get_experts_implementation(self) -> dict[str, str]:
        """transformers asks; there is nothing to switch in a graph."""
        return {}

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: OrtCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        selects: bool | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a call; a call on an empty cache, or of at least `min_select_tokens` tokens, selects.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, S + T], 0 where padding; S is the length of the cache.
            position_ids: int64 [B, T]; by default counted over the real tokens.
            past_key_values: of earlier calls, or None.
            selects: True selects whatever the length; False runs the cache's selection, or without one the whole
                weights (dense).
            logits_to_keep: compute the logits of so many last tokens alone; 0: of all T.

        Returns:
            logits fp32 [B, T or logits_to_keep, V] and the cache.

        Raises:
            InputError: shapes do not fit, a token id is out of range, or an argument that the graph has no input for.
            StateError: the cache is not an OrtCache.
        """
        unknown = [name for name, value in others.items() if value is not None and value is not False]
        if unknown:
            raise InputError(f"{', '.join(unknown)}: an exported model has no such input; leave it out")
        check_ids(input_ids, self.config.get_text_config().vocab_size, "input_ids")
        check_integers(0, logits_to_keep=logits_to_keep)
        cache = OrtCache() if past_key_values is None else past_key_values
        if not isinstance(cache, OrtCache):
            raise StateError(f"past_key_values is {type(cache).__name__}; give an OrtCache or None")
        batch, length, before = *input_ids.shape, cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(batch, before + length, dtype=torch.int64)
        if attention_mask.shape != (batch, before + length):
            raise InputError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; give {(batch, before + length)}: "
                "that of the cache and the new tokens"
            )
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if selects is None:
            selects = length >= self.min_select_tokens or (before == 0 and not self.steps)
        feeds = {INPUT_IDS: input_ids, MASK: attention_mask, POSITIONS: position_ids.expand(batch, -1)}
        binding = self.session.io_binding()
        for name, tensor in feeds.items():
            binding.bind_ortvalue_input(name, ort_value(np.ascontiguousarray(tensor.cpu().numpy(), np.int64)))
        binding.bind_ortvalue_input(KEEP_LOGITS, ort_value(np.array(logits_to_keep, np.int64)))
        binding.bind_ortvalue_input(MIN_SELECT, ort_value(_ALWAYS if selects else _NEVER))
        for name, value in (cache.past or self._empty(batch)).items():
            binding.bind_ortvalue_input(name, value)
        reused = cache.compact if self.reuses else {}
        for name, value in (self.history if selects else reused).items():
            binding.bind_ortvalue_input(name, value)
        learns = selects and self.updates_history
        state = [*self._compact * selects, *self._history * learns]
        wanted = [LOGITS, *self._present, *map(output_of, state)]
        for name in wanted:
            binding.bind_output(name, "cpu" if name == LOGITS else self._memory)
        self.session.run_with_iobinding(binding)
        found = dict(zip(wanted, binding.get_outputs(), strict=True))
        logits = torch.from_numpy(found[LOGITS].numpy()).float()
        if use_cache:
            cache.past = {input_of(n): found[n] for n in self._present}
            if selects:
                cache.compact = {n: found[output_of(n)] for n in self._compact}
        if learns:
            self.history = {n: found[output_of(n)] for n in self._history}
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)

    def _empty(self, batch: int) -> dict[str, Any]:
        shapes = {n: i.shape for n, i in self._inputs.items() if of_kind(n, PAST)}
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {n: ort_value(np.zeros((batch, s[1], 0, s[3]), types[self._inputs[n].type])) for n, s in shapes.items()}

    def prepare_inputs_for_generation(  # type: ignore[override]  # of its arguments what a graph has inputs for
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' GenerationMixin: the tokens that the cache does not hold yet."""
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {"input_ids": input_ids[:, before:], "past_key_values": past_key_values}
        kept: dict[str, Any] = {k: kwargs[k] for k in ("use_cache", "logits_to_keep") if k in kwargs}
        return {**inputs, "attention_mask": attention_mask, **kept}

    def _prepare_cache_for_generation(  # type: ignore[override]  # what else is given does not matter
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """The cache of a generation is always ours."""
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = OrtCache()

    def _reorder_cache(self, past_key_values: OrtCache, beam_idx: Tensor) -> OrtCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values
