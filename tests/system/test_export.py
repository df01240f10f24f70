"""ONNX: onnxruntime against torch, both phases; stock tools' view of the file; bad input leaves nothing behind."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxscript import ir
from transformers import DynamicCache, OPTConfig, OPTForCausalLM, Phi3Config, Phi3ForCausalLM

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.errors import ExportError, InputError, StateError
from pp_fx.export import OrtModel, check
from pp_fx.export.functions import Solve
from pp_fx.runtime.state import states_of
from tests.helpers.models import EXPORTED, pruned, tiny_llama


@pytest.fixture
def both(exported):
    model, folder = exported
    with pp_fx.history_frozen(model):
        yield model, OrtModel.from_pretrained(folder, threads=1)


def masked(ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return mask


@pytest.mark.parametrize(("batch", "length"), [(1, 40), (3, 40), (2, 5), (4, 77), (1, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_both_phases_give_torchs_logits_and_kept_units(both, batch, length, padded):
    """Long prompts (least squares from 100 tokens on), short ones (history alone), decoding, a second turn."""
    model, ours = both
    ids = torch.randint(2, 97, (batch, length + 36), generator=torch.Generator().manual_seed(length))
    mask = masked(ids) if padded and length > 9 else torch.ones_like(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, ort_cache = DynamicCache(), None
    for start, stop in ((0, length), (length, length + 1), (length + 1, length + 4), (length + 4, length + 36)):
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        with torch.no_grad():
            expected = model(ids[:, start:stop], past_key_values=cache, **given).logits
        out = ours(ids[:, start:stop], past_key_values=ort_cache, **given)
        ort_cache = out.past_key_values
        real = mask[:, start:stop].bool()
        torch.testing.assert_close(out.logits[real], expected[real], atol=1e-4, rtol=1e-4)
        for index, groups in selections_on(cache).layers.items():
            for kind, selection in groups.items():
                kept = ort_cache.compact[f"pp_compact.{index}.{kind}.kept"].numpy()
                assert np.array_equal(kept, selection.kept.numpy())


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_gives_torchs_text(both, ids, mode, padded):
    model, ours = both
    given = {"attention_mask": masked(ids) if padded else torch.ones_like(ids), "max_new_tokens": 12, **mode}
    torch.manual_seed(0)
    expected = model.generate(ids, **given)
    torch.manual_seed(0)
    assert torch.equal(ours.generate(ids, **given), expected)


def test_tools_that_know_nothing_of_selections_get_right_unpruned_decoding(exported, ids):
    """The ecosystem's inputs and outputs alone: the prompt is pruned, decoding is dense."""
    model, folder = exported
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    required = {i.name for i in session.get_inputs()}
    past = {f"past_key_values.{i}.{part}" for i in range(3) for part in ("key", "value")}
    assert required == {"input_ids", "attention_mask", "position_ids"} | past
    empty = {name: np.zeros((3, 2, 0, 16), np.float32) for name in past}
    wanted = ["logits", *sorted(n.replace("past_key_values", "present") for n in past)]
    positions = np.arange(40)[None].repeat(3, 0)
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((3, 40), np.int64), "position_ids": positions}
    found = dict(zip(wanted, session.run(wanted, {**feeds, **empty}), strict=True))
    with torch.no_grad(), pp_fx.history_frozen(model):
        cache = DynamicCache()
        expected = model(ids, past_key_values=cache).logits
        np.testing.assert_allclose(found["logits"], expected.numpy(), atol=1e-4, rtol=1e-4)
        pp_fx.restore(model)
        try:
            expected = model(ids[:, :1], past_key_values=cache).logits
        finally:
            pruned(model)
    feeds = {"input_ids": ids[:, :1].numpy(), "attention_mask": np.ones((3, 41), np.int64)}
    feeds |= {"position_ids": np.full((3, 1), 40), **{n: found[n.replace("past_key_values", "present")] for n in past}}
    np.testing.assert_allclose(session.run(["logits"], feeds)[0], expected.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [40, 3])
def test_every_output_has_a_shape_that_the_file_declares(exported, ids, length, capfd):
    """A short call selects nothing: its compact weights have no rows. onnxruntime warns of what was not declared."""
    session = onnxruntime.InferenceSession(exported[1] / "model.onnx")
    feeds = {"input_ids": ids[:, :length].numpy(), "attention_mask": np.ones((3, length), np.int64)}
    feeds["position_ids"] = np.arange(length)[None].repeat(3, 0)
    for i in range(3):
        feeds |= {f"past_key_values.{i}.{part}": np.zeros((3, 2, 0, 16), np.float32) for part in ("key", "value")}
    capfd.readouterr()
    found = session.run(None, feeds)
    assert "shape" not in capfd.readouterr().err
    for declared, value in zip(session.get_outputs(), found, strict=True):
        fixed = [(n, m) for n, m in zip(declared.shape, value.shape, strict=True) if isinstance(n, int)]
        assert all(n == m for n, m in fixed), (declared.name, declared.shape, value.shape)


def test_history_learns_when_it_is_fed_back(exported, ids):
    model, folder = exported
    ours = OrtModel.from_pretrained(folder, threads=1)
    ours.updates_history = True
    states = {f"{i}.{kind}": s for i, layer in enumerate(model.model.layers) for kind, s in layer.states().items()}
    before = {name: {k: v.clone() for k, v in s._buffers.items() if v is not None} for name, s in states.items()}
    try:
        for batch in (ids, ids.flip(1)):
            ours(batch)
            with torch.no_grad():
                model(batch)
        for name, value in ours.history.items():
            _, index, kind, key = name.split(".")
            expected = getattr(states[f"{index}.{kind}"], key).numpy()
            np.testing.assert_allclose(value.numpy(), expected, atol=1e-5, rtol=1e-4, err_msg=name)
        assert not np.array_equal(ours.history["pp_history.1.mlp.energy"].numpy(), before["1.mlp"]["energy"].numpy())
    finally:
        for name, buffers in before.items():
            for key, value in buffers.items():
                getattr(states[name], key).copy_(value)


def test_a_prompt_too_short_for_a_probe_teaches_nothing(exported, ids):
    model, folder = exported
    ours = OrtModel.from_pretrained(folder, threads=1)
    ours.updates_history = True
    ours(ids)
    before = {name: value.numpy().copy() for name, value in ours.history.items()}
    assert before
    seen = [s.energy.clone() for s in states_of(model) if s.prunes]
    ours(ids[:, :10])
    with torch.no_grad():
        model(ids[:, :10])
    assert all(np.array_equal(before[name], value.numpy()) for name, value in ours.history.items())
    for old, state in zip(seen, (s for s in states_of(model) if s.prunes), strict=True):
        assert torch.equal(old, state.energy)


def test_logits_of_the_last_tokens_alone(both, ids):
    _, ours = both
    everything = ours(ids).logits
    torch.testing.assert_close(ours(ids, logits_to_keep=2).logits, everything[:, -2:])


def test_caches_are_cropped_reordered_and_copied(both, ids):

    _, ours = both
    cache = ours(ids).past_key_values
    nxt = ids[:, :1]
    expected = ours(nxt, past_key_values=copy.deepcopy(cache)).logits
    other = copy.deepcopy(cache)
    ours(ids[:, :3], past_key_values=other)
    other.crop(40)
    torch.testing.assert_close(ours(nxt, past_key_values=other).logits, expected)
    other = copy.deepcopy(cache)
    other.reorder_cache(torch.tensor([2, 0, 1]))
    order = [2, 0, 1]
    torch.testing.assert_close(ours(nxt[order], past_key_values=other).logits, expected[order])
    other.reset()
    assert other.get_seq_length() == 0
    assert not other.compact


def test_a_check_with_wrong_logits_fails_even_where_a_near_tie_differs(exported, monkeypatch):
    import pp_fx.export.agreement as module

    class Wrong(module.OrtModel):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits += 0.5 * out.logits.abs().max()
            return out

    monkeypatch.setattr(module, "OrtModel", Wrong)
    found = module.check(exported[1])
    assert found.agreement == 1
    assert not found.passed
    with pytest.raises(ExportError, match="logits by"):
        found.require()
    assert not module.Check(difference=0.5, agreement=0.999, tolerance=1e-3, prompts=3).passed


def test_weights_lie_in_the_file_once(exported):
    model, folder = exported
    stored = sum(v.const_value.nbytes for v in ir.load(folder / "model.onnx").graph.initializers.values())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    extra = sum(b.numel() * b.element_size() for b in model.buffers())
    assert stored < 1.05 * (weights + extra) + 4000


FAMILIES = {
    "OPT": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=97, hidden_size=64, num_hidden_layers=3, ffn_dim=96, num_attention_heads=4,
                  word_embed_proj_dim=64, max_position_embeddings=200)
    ),
    "Phi3": lambda: Phi3ForCausalLM(
        Phi3Config(vocab_size=97, hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=200, original_max_position_embeddings=200,
                   pad_token_id=0, eos_token_id=None, bos_token_id=1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f == "OPT")) for f in FAMILIES])
def test_biases_and_fused_weights(family, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    pp_fx.export.onnx(pruned(model), tmp_path / "out", verify=False)
    found = check(tmp_path / "out")
    assert found.agreement == 1
    assert found.difference < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {
            "decode": "dense",
            "mlp_compensation": None,
            "attention_compensation": None,
            "probe": {"token_fraction": 0.1, "ranking": "outlier"},
        },
        pytest.param(
            {"attention_ratio": 0.0, "probe": {"token_fraction": 0.1, "sample_fraction": 0.6, "ranking": "even"}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"history": None, "attention_ratio": 0.0, "mlp_compensation": "mean"}, marks=pytest.mark.slow),
    ],
)
def test_other_configurations(changes, tmp_path):
    """No history, dense decoding, other rankings of the probe.

    `exported_half` is a static method with layers of different widths.
    """
    config = pp_fx.ProbePruningConfig.from_dict({**EXPORTED.to_dict(), **changes})
    pp_fx.export.onnx(pruned(tiny_llama(), config), tmp_path / "out")
    found = check(tmp_path / "out")
    assert found.agreement == 1
    assert found.difference < 1e-4


def test_half_precision(exported_half):
    found = check(exported_half)
    assert found.passed
    assert found.difference < 5e-3


def test_attention_shares_the_key_value_heads(exported):
    """Where all heads run, keys and values are not repeated for the query heads of their group."""
    graph = ir.load(exported[1] / "model.onnx").graph
    nodes = list(ir.traversal.RecursiveGraphIterator(graph))
    repeated = [n for n in nodes if n.op_type == "Attention" and n.inputs[1].producer().op_type == "Reshape"]
    assert sum(n.op_type == "Attention" for n in nodes) >= 2 * 3
    assert not repeated


@pytest.mark.parametrize(("n", "m"), [(1, 1), (31, 3), (32, 5), (33, 1), (100, 7), (321, 64)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_body_of_solve_is_as_exact_as_cholesky(n, m, scale):
    generator = torch.Generator().manual_seed(n)
    factor = torch.randn(n, 2 * n, generator=generator) * torch.rand(2 * n, generator=generator) * scale
    a, b = torch.eye(n) + factor @ factor.T, torch.randn(n, m, generator=generator)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Solve", ["A", "B"], ["Y"], domain="pp_fx")],
        "solve",
        [value("A", 1, ["n", "n"]), value("B", 1, ["n", "m"])],
        [value("Y", 1, ["n", "m"])],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("pp_fx", 1)]
    model = onnx.helper.make_model(graph, functions=[Solve.to_function_proto()], opset_imports=opsets, ir_version=10)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"A": a.numpy(), "B": b.numpy()})[0]
    exact = torch.linalg.solve(a.double(), b.double())
    ours = (torch.from_numpy(found) - exact).norm() / exact.norm()
    cholesky = (torch.ops.pp_fx.solve(a, b) - exact).norm() / exact.norm()
    assert ours <= 10 * cholesky + 1e-6


def test_calls_that_do_not_fit_are_refused(both, ids):
    _, ours = both
    with pytest.raises(InputError, match="attention_mask"):
        ours(ids, attention_mask=torch.ones(3, 39))
    with pytest.raises(InputError, match="input_ids"):
        ours(ids[0])
    with pytest.raises(InputError, match=r"token id 97, out of range \[0, 97\)"):
        ours(torch.full((1, 4), 97))
    with pytest.raises(InputError, match="logits_to_keep=-1"):
        ours(ids, logits_to_keep=-1)
    with pytest.raises(InputError, match="inputs_embeds"):
        ours(ids, inputs_embeds=torch.zeros(3, 40, 64))
    with pytest.raises(StateError, match="OrtCache"):
        ours(ids, past_key_values=DynamicCache())


def test_nodes_are_counted_by_provider(exported):
    _, folder = exported
    found = pp_fx.export.placement(folder, "CPUExecutionProvider", length=40)
    assert {phase: list(places) for phase, places in found.items()} == {
        "prefill": ["CPUExecutionProvider"],
        "decode": ["CPUExecutionProvider"],
    }
    prefill, decode = (found[phase]["CPUExecutionProvider"] for phase in ("prefill", "decode"))
    assert prefill["TopK"] > 0
    assert decode["TopK"] == 0  # a step selects nothing


def test_a_provider_that_is_not_there_is_refused(exported):
    _, folder = exported
    for call in (pp_fx.export.check, pp_fx.export.OrtModel.from_pretrained):
        with pytest.raises(InputError, match="provider='TPU' is not in this onnxruntime"):
            call(folder, provider="TPU")


@pytest.mark.gpu
def test_the_cuda_provider_agrees_with_torch(exported):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider; pip install 'pp-fx[onnxruntime-gpu]'")
    assert pp_fx.export.check(exported[1], provider="CUDAExecutionProvider").passed
