"""An MLP of a served model: its weights, its `GroupState`, and what a step makes of them.

vLLM calls two linear layers, with the model's own activation between them. How many channels run differs from step to
step and from row to row, and shapes in a compiled graph may not: so the first call runs the whole MLP and keeps the
result for the second. What passes between them is a sample of a few channels, by which the first step of a model is
compared: the model's activation must make of it what ours does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import kernels
from ...config import ProbePruningConfig
from ...errors import UnsupportedModelError
from ...kernels.coded import encode
from ...layouts import by_columns, is_plain, row_range, stored_bytes, take_columns, widened
from ...methods import Compensation
from ...process_settings import own_defaults
from ...rewrite.widths import kept_units, step_units
from ...runtime.compact import compact_linear, make_compact
from ...runtime.compensate import compensate
from ...runtime.gather import beside, corrected, gather_columns, gather_rows
from ...runtime.history import update_history
from ...runtime.names import STEP
from ...runtime.plan import LayerInfo, Plan, lasting_tokens, plan_call
from ...runtime.probe import choose_rows, probe_state, take_rows
from ...runtime.rolling import adopt, roll
from ...runtime.select import choose_units, unit_scores
from ...runtime.selections import Selection
from ...runtime.state import GroupState
from ...runtime.step import Part, gated_step
from .operators import SAMPLE
from .quantized import scaled_product
from .steps import Steps

_Product = Callable[[Tensor], Tensor]
_CLOSE = 0.01
"""Of the norm of a sample: two activations that differ by less are the same one, rounded elsewhere (bf16: 0.003)."""


class PrunedMlp:
    """See the module. C and k are this rank's channels, and how many of them a selection keeps.

    Attributes:
        name: of the module, in vLLM's forward context, too.
        index: of the decoder layer.
        ratio, stepped: the shares that prompts, and the tokens of decode steps, leave out.
        state: fp32 statistics; made when the weights are there.
        compiled: whether vLLM compiles the model.
        dense_inputs, dense_output: vLLM's own products with all channels: [T, H] -> [T, 2C], [T, C] -> [T, H].
    """

    state: GroupState
    dense_inputs: Callable[[Tensor, Tensor | None], Tensor]
    dense_output: Callable[[Tensor], Tensor]

    def __init__(
        self,
        name: str,
        index: int,
        ratio: float,
        stepped: float,
        settings: ProbePruningConfig,
        steps: Steps,
        activation: Callable[[Tensor], Tensor],
        compiled: bool,
        loaded: Callable[[], None],
    ) -> None:
        self.name, self.index, self.ratio, self.stepped, self.settings = name, index, ratio, stepped, settings
        self.steps, self.activation, self.compiled, self.loaded = steps, activation, compiled, loaded
        self.channels = self.hidden = 0
        self.ready = False
        self._layer = LayerInfo(index, 0, settings, settings, True)
        self._held: tuple[_Product, _Product, Compensation | None] | None = None
        self._result: Tensor | None = None
        self._expected: Tensor | None = None
        self._compared = False

    def take_inputs(self, sizes: list[int]) -> None:
        """Sizes of the merged input projection on this rank: [C, C].

        Raises:
            UnsupportedModelError: they are others.
        """
        if len(sizes) != 2 or sizes[0] != sizes[1]:
            raise UnsupportedModelError(f"{self.name}: {sizes} are not the sizes of a gate and an up projection")
        self.channels = sizes[0]

    def take_output(self, channels: int, sizes: list[int]) -> None:
        """Sizes of the output projection on this rank: C, [H].

        Raises:
            UnsupportedModelError: it does not read what the input projections make, or so few that nothing is left.
        """
        if channels != self.channels:
            raise UnsupportedModelError(
                f"{self.name}: the output projection reads {channels} channels, gate and up make {self.channels}"
            )
        if channels < SAMPLE:
            raise UnsupportedModelError(f"{self.name} has {channels} channels on each rank, fewer than {SAMPLE}")
        self.hidden = sizes[0]

    def keep_inputs(self, weight: Tensor, bias: Tensor | None) -> None:
        """Gate over up: [2C, H], plain or quantized (`pp_fx.layouts`), and [2C] or None."""
        self._inputs, self._bias = weight, bias

    @own_defaults()
    def keep_output(self, weight: Tensor) -> None:
        """The output projection [H, C], plain or quantized, of which columns are read. Makes the state."""
        self._output = by_columns(weight)
        kept = kept_units("mlp", self.channels, self.ratio, self.settings)
        run = step_units(self.channels, self.stepped)
        self.state = GroupState(
            "mlp", self.channels, 1, kept, self.settings, self._output, self._probe, step_units=run, factor=self._factor
        )
        if self.state.steps:
            bits = self.settings.step_probe
            rows = row_range(self._inputs, (0, self.channels, 1))
            gate = None if bits is None else encode(widened(rows), int(bits[3:]))
            self.state.refresh(self._output, None, gate)
        self.ready = True

    @property
    def compact_bytes(self) -> float:
        """Of the weights of one selection."""
        return (stored_bytes(self._inputs) + stored_bytes(self._output)) * self.state.kept_units / self.channels

    @own_defaults()
    def select_by_history(self) -> None:
        """Choose once and for all, and hold the compact weights (`freeze_history=True` or `probe=None`).

        Raises:
            StateError: there is no calibrated history.
        """
        cache: Any = None
        plan = Plan((1, lasting_tokens(self.settings)), self.settings, True, False, cache, {})
        selection = choose_units(self.state, None, plan, self._layer)
        assert selection is not None
        made = compensate(self.state, selection, None, None, self._output, plan)
        rows = self._rows_of(selection)
        inputs = _lasting(kernels.kept_rows(self._inputs, rows), self._kept_bias(rows))
        output, vector = self._columns(selection), None
        if made is not None and is_plain(output):
            output, vector, made = corrected(output, made), made.vector, None
        self._held = inputs, _lasting(output, vector), made

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The whole MLP over the present step; `result` hands it out.

        Args:
            x: [T, H].
            bias: of gate and up [2C], or None.

        Returns:
            [T, 2 * SAMPLE]: what gate and up make of the first channels, until the first `result` has compared it.
        """
        step = self.steps.present(x)
        plan = plan_call(self._layer, x[None], None, {STEP: step})
        if self._held is None:
            plan = roll(self.state, plan, self._layer, x[None], (), self._output)
        if step.prompts is not None and step.others is not None:
            out = x.new_empty(x.shape[0], self.hidden)
            out[step.prompts], plan = self._prompts(x.index_select(0, step.prompts), bias, plan)
            out[step.others] = self._others(x, bias, plan)
            self._result = out
        elif step.decode == "dense":
            self._result, _ = self._prompts(x, bias, plan)
        else:
            self._result = self._others(x, bias, plan)
        if self._compared:
            return x.new_zeros(x.shape[0], 2 * SAMPLE)
        rows = torch.arange(SAMPLE, device=x.device)
        rows = torch.cat([rows, rows + self.channels])
        sample = F.linear(
            x, kernels.kept_rows(self._inputs, rows), None if bias is None else bias.index_select(0, rows)
        )
        self._expected = self.activation(sample)
        return sample

    def result(self, sample: Tensor, bias: Tensor | None) -> Tensor:
        """What `run` has made: [T, H].

        Args:
            sample: [T, SAMPLE], the model's activation of what `run` gave out.
            bias: of the output projection [H], or None.

        Raises:
            UnsupportedModelError: the model does something else between its two linear layers.
        """
        if self._expected is not None:
            expected, found = self._expected.float(), sample.float()
            if found.shape != expected.shape or (found - expected).norm() > _CLOSE * expected.norm():
                raise UnsupportedModelError(
                    f"{self.name} does something else than its configuration's activation of gate times up; it cannot "
                    "be served pruned, leave quantization='pp_fx' out"
                )
            self._expected, self._compared = None, True
        out, self._result = self._result, None
        assert out is not None
        return out if bias is None else out + bias

    def _dense(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.dense_output(self.activation(self.dense_inputs(x, bias)))

    def _prompts(self, x: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Tensor, Plan]:
        """[P, H] of prompt tokens over the channels that they, or the history, choose; in small steps over all.

        And the plan, with what decoding reads among its `stored`.
        """
        if not plan.selects or not self.state.prunes:
            return self._dense(x, bias), plan
        if self._held is not None:
            return self._by_history(x), plan
        batch, state = x[None], self.state
        rows = choose_rows(state, batch, None, plan)
        z = probe_state(state, (take_rows(batch, rows),), ())
        selection = choose_units(state, unit_scores(state, z, rows, None, plan), plan, self._layer)
        made = compensate(state, selection, z, rows, self._output, plan)
        assert selection is not None
        ran = self.activation(self._kept_inputs(x, selection))
        batch_ran = ran[None]
        out = self._kept_output(ran, selection, made)
        update_history(
            state, batch_ran, selection, real=None, probe=z, rows=rows, gram=None, residual=batch, weight=self._output,
            plan=plan,
        )  # fmt: skip
        return out, adopt(state, plan, self._layer, selection, made, self._output)

    def _others(self, x: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        """[D, H] of the step's tokens that decode, and padding: by `decode`."""
        step = plan.engine
        assert step is not None
        chosen = gated_step(self.state, plan, x, *self._parts(bias), self._output, None)
        if chosen is not None:
            return chosen
        if step.others is not None:
            x = x.index_select(0, step.others)
        if step.decode != "rolling" or not self.state.prunes:
            return self._dense(x, bias)
        if self._held is not None:
            return self._by_history(x)
        selection = plan.stored.get("mlp")
        if selection is None:
            return self._dense(x, bias)
        middle = self.channels
        layout = (0, (0, middle, 1)), (0, (middle, 2 * middle, 1))
        gate_up = gather_rows(selection, x, (self._inputs,), (bias,), layout, 2)
        ran = self.activation(torch.cat(gate_up, -1))  # type: ignore[arg-type]
        return gather_columns(selection, ran, self._output, None, compensation=selection.compensation)

    def _by_history(self, x: Tensor) -> Tensor:
        """[N, H] of any tokens over what the history has chosen once and for all."""
        assert self._held is not None
        inputs, output, made = self._held
        z = self.activation(inputs(x))
        return beside(output(z), z, made)

    def _kept_inputs(self, x: Tensor, selection: Selection) -> Tensor:
        """Gate over up of the kept channels: [P, H] -> [P, 2k]."""
        rows = self._rows_of(selection)
        bias = self._kept_bias(rows)
        if is_plain(self._inputs) and kernels.large(self._inputs, rows):
            out = kernels.gather_linear(x, self._inputs, rows)
            return out if bias is None else out + bias
        return _linear(x, kernels.kept_rows(self._inputs, rows), bias)

    def _kept_output(self, z: Tensor, selection: Selection, made: Compensation | None) -> Tensor:
        """The output projection of the kept channels: [P, k] -> [P, H]."""
        if is_plain(self._output):
            return gather_columns(selection, z, self._output, None, compensation=made)
        return beside(_linear(z, self._columns(selection), None), z, made)

    def _columns(self, selection: Selection) -> Tensor:
        """Of the output projection: [H, k]."""
        output, columns = self._output, selection.columns
        return kernels.kept_rows(output.t(), columns).t() if is_plain(output) else take_columns(output, columns)

    def _kept_bias(self, rows: Tensor) -> Tensor | None:
        return None if self._bias is None else self._bias.index_select(0, rows)

    def _rows_of(self, selection: Selection) -> Tensor:
        """Where the kept channels lie in gate over up: int64 [2k]."""
        return torch.cat([selection.columns, selection.columns + self.channels])

    def _parts(self, bias: Tensor | None) -> tuple[Part, Part]:
        """The gate and the up projection."""
        middle = self.channels
        return (self._inputs, bias, (0, middle, 1)), (self._inputs, bias, (middle, 2 * middle, 1))

    def _factor(self, state: GroupState, gate: Tensor) -> Tensor:
        """What the up projection is multiplied by: [N, C] -> [N, C]."""
        return self.activation(torch.cat([gate, torch.ones_like(gate)], -1))

    def _probe(self, state: GroupState, x: Tensor) -> Tensor:
        """The intermediate state of the probe's rows: [1, T', H] -> [1, T', C]."""
        out = self.dense_inputs(x.flatten(0, -2), self._bias)
        return self.activation(out.view(*x.shape[:-1], -1))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, in] through a part [out, in] of a weight, for once."""
    product = scaled_product(weight)
    if product is None:
        return F.linear(x, weight, bias)
    return product(x) if bias is None else product(x) + bias


def _lasting(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear layer x [N, in] -> [N, out] over a part of a weight that is kept."""
    product = scaled_product(weight)
    if product is None:
        return partial(compact_linear, linear=make_compact(weight, bias))
    return product if bias is None else lambda x: product(x) + bias
