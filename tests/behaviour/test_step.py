"""decode="step": every token of a decode step chooses the MLP's channels by its own gate; against plain models."""

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.errors import ConfigError
from pp_fx.kernels import strongest
from pp_fx.kernels.coded import decode, encode, rounded
from pp_fx.rewrite.layer import layers_of
from tests.helpers.caches import call, make
from tests.helpers.device import DEVICE
from tests.helpers.families import VOCABULARY, build
from tests.helpers.models import tiny_llama

IDS = torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def config(**changes):
    fields = {"mlp_ratio": 0.0, "decode": "step", "decode_ratio": 0.5, "round_to": 1, "skip_layers": 1}
    return pp_fx.ProbePruningConfig(**{**fields, **changes})


def eager(model, ratio, shortest=32):
    """The rule written into a Llama's own modules: calls of fewer tokens keep the strongest channels of each."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.forward = _forward(layer.mlp, ratio, shortest)
    return model


def _forward(mlp, ratio, shortest):
    channels = mlp.down_proj.in_features

    def forward(x):
        gate = F.silu(mlp.gate_proj(x))
        z = gate * mlp.up_proj(x)
        if x.shape[1] < shortest:
            strength = gate.abs() * mlp.down_proj.weight.norm(dim=0)
            kept = strength.argsort(-1, descending=True)[..., : channels - int(ratio * channels)]
            z = z * torch.zeros_like(z).scatter(-1, kept, 1.0)
        return mlp.down_proj(z)

    return forward


def run(model, chunks, cache=None, ids=IDS, prompt=40):
    """Logits of a prompt and of calls of so many tokens after it."""
    cache, start, found = cache or DynamicCache(config=model.config), prompt, []
    found.append(call(model, ids[:, :prompt], cache))
    for count in chunks:
        found.append(call(model, ids[:, start : start + count], cache))
        start += count
    return torch.cat(found, 1)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([0.1, 0.3, 0.5, 0.7]),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.sampled_from(["dynamic", "static"]),
    st.booleans(),
    st.integers(0, 999),
)
def test_decoding_is_the_rule_written_into_the_model(ratio, chunks, kind, bias, seed):
    model = tiny_llama(bias=bias, seed=seed)
    expected = run(eager(model, ratio), chunks)
    pp_fx.transform(model, config(decode_ratio=ratio))
    torch.testing.assert_close(run(model, chunks, make(kind, model)), expected, atol=2e-4, rtol=1e-4)


def test_a_token_does_not_depend_on_its_batch_nor_on_how_tokens_are_cut_into_calls():
    model = pp_fx.transform(tiny_llama(), config())
    together = run(model, [1] * 6)
    torch.testing.assert_close(run(model, [4, 2]), together, atol=1e-4, rtol=1e-4)
    for row in range(len(IDS)):
        alone = run(model, [1] * 6, ids=IDS[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-4, rtol=1e-4)


def test_attention_reads_its_weights_by_the_kernel_too(monkeypatch):
    """The four projections and the gate of every layer; in calls of more tokens than kernels take none."""
    read, plain = [], strongest.linear_rows

    def counted(x, weight, *rest):
        read.append(weight.data_ptr())
        return plain(x, weight, *rest)

    monkeypatch.setattr(strongest, "linear_rows", counted)
    model = pp_fx.transform(tiny_llama(), config())
    wanted = run(eager(tiny_llama(), 0.5), [1, 9])
    torch.testing.assert_close(run(model, [1, 9]), wanted, atol=1e-4, rtol=1e-4)
    attention = [m.weight.data_ptr() for layer in model.model.layers for m in layer.self_attn.children()]
    gates = [layer.mlp.gate_proj.weight.data_ptr() for layer in model.model.layers]
    assert sorted(read) == sorted(attention + gates)


def test_nothing_of_a_choice_stays_on_the_cache():
    model = pp_fx.transform(tiny_llama(), config(mlp_ratio=0.3))
    cache = DynamicCache(config=model.config)
    run(model, [1, 3], cache)
    assert not selections_on(cache).layers
    assert pp_fx.cache.compact_bytes(cache) == 0


def test_prompts_are_pruned_by_a_ratio_of_their_own():
    dense, model = tiny_llama(), tiny_llama()
    pp_fx.transform(model, config(mlp_ratio=0.3, decode_ratio=0.0))
    sticky = pp_fx.transform(tiny_llama(), config(mlp_ratio=0.3, decode="dense", decode_ratio=None))
    pruned, exact = run(model, [1, 1]), run(dense, [1, 1])
    assert not torch.allclose(pruned[:, :40], exact[:, :40])
    torch.testing.assert_close(pruned, run(sticky, [1, 1]), atol=1e-5, rtol=1e-5)


def test_no_ratio_is_the_dense_model_bit_for_bit():
    dense, model = tiny_llama(), tiny_llama()
    pp_fx.transform(model, config(decode_ratio=0.0))
    assert torch.equal(run(model, [1, 3]), run(dense, [1, 3]))


def test_a_short_prompt_chooses_too():
    model, expected = tiny_llama(), eager(tiny_llama(), 0.5)
    pp_fx.transform(model, config())
    torch.testing.assert_close(run(model, [1, 2], prompt=7), run(expected, [1, 2], prompt=7), atol=2e-4, rtol=1e-4)


def test_auto_steps_in_small_batches_and_is_dense_in_large_ones():
    """However the tokens are cut into calls, as assisted decoding does."""
    by_step, dense = pp_fx.transform(tiny_llama(), config()), tiny_llama()
    small = pp_fx.transform(tiny_llama(), config(decode="auto", step_batch=2))
    large = pp_fx.transform(tiny_llama(), config(decode="auto", step_batch=1))
    torch.testing.assert_close(run(small, [1, 5]), run(by_step, [1, 5]))
    torch.testing.assert_close(run(large, [1, 5]), run(dense, [1, 5]), atol=1e-5, rtol=1e-5)
    assert pp_fx.ProbePruningConfig(decode="auto").on("cpu").step_batch == 4
    assert pp_fx.ProbePruningConfig(decode="auto").on("cuda").step_batch == 0


def test_more_tokens_than_the_kernels_take_give_the_same(monkeypatch):
    model = pp_fx.transform(tiny_llama(), config())
    found = run(model, [3, 1])
    monkeypatch.setattr(strongest, "MOST_TOKENS", 0)
    torch.testing.assert_close(run(model, [3, 1]), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "gated"), [("Llama", True), ("Phi3", True), ("Gemma", True), ("OPT", False), ("GPT-NeoX", False)]
)
def test_the_gate_is_found_by_dataflow(family, gated):
    model = build(family)
    dense = copy.deepcopy(model)
    pp_fx.transform(model, config())
    states = [layer.states()["mlp"] for layer in layers_of(model)]
    assert all(state.steps and (state.factor is not None) is gated for state in states)
    ids = torch.randint(2, VOCABULARY, (2, 44), generator=torch.Generator().manual_seed(1))
    found, exact = run(model, [1, 1], ids=ids), run(dense, [1, 1], ids=ids)
    exactly = 0.0 if DEVICE == "cpu" else 1e-5  # the output projection lies transposed: another kernel on CUDA
    torch.testing.assert_close(found[:, :40], exact[:, :40], atol=exactly, rtol=exactly)
    assert not torch.allclose(found[:, 40:], exact[:, 40:], atol=1e-6)
    for state in states:
        state.step_units = state.units  # every channel is chosen
    torch.testing.assert_close(run(model, [1, 1], ids=ids), exact, atol=1e-5, rtol=1e-4)


def test_compiled_generation_is_the_uncompiled_one_with_one_graph_for_all_steps():
    model = pp_fx.transform(tiny_llama(), config())
    expected = run(model, [1] * 5)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    cache = make("static", model)
    with torch.no_grad():
        found = [compiled(IDS[:, :40], past_key_values=cache).logits]
        found += [compiled(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(40, 45)]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-4, rtol=1e-4)
    assert counter.frame_count == 2, "the prompt's graph and that of a step"


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_copy_of_the_gate_ranks_and_the_gate_computes(bits):
    """As if the copy stood where the channels are chosen, and nowhere else."""
    model, dense = tiny_llama(bias=True), tiny_llama(bias=True)
    expected = eager(dense, 0.5)
    for layer in expected.model.layers:
        layer.mlp.forward = _ranked(layer.mlp, decode(encode(layer.mlp.gate_proj.weight, int(bits[3:]))))
    pp_fx.transform(model, config(step_probe=bits))
    found = run(model, [1, 2, 1])
    torch.testing.assert_close(found, run(expected, [1, 2, 1]), atol=3e-4, rtol=1e-4)
    assert not torch.allclose(found, run(pp_fx.transform(dense, config()), [1, 2, 1]), atol=1e-4)
    other = tiny_llama(bias=True, seed=4)
    model.load_state_dict(other.state_dict())
    again = pp_fx.transform(other, config(step_probe=bits))
    torch.testing.assert_close(run(model, [1]), run(again, [1]))
    torch.compiler.reset()
    cache = make("static", model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        logits = [compiled(part, past_key_values=cache).logits for part in (IDS[:, :40], IDS[:, 40:41])]
    torch.testing.assert_close(torch.cat(logits, 1), run(model, [1]), atol=3e-4, rtol=1e-4)


def _ranked(mlp, copied):
    def forward(x):
        z = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        if x.shape[1] < 32:
            near = rounded(x.flatten(0, 1)).view_as(x)
            ranked = F.silu(F.linear(near, copied[:, : x.shape[-1]], mlp.gate_proj.bias)).abs()
            strength = ranked * mlp.down_proj.weight.norm(dim=0)
            kept = strength.argsort(-1, descending=True)[..., : strength.shape[-1] - strength.shape[-1] // 2]
            z = z * torch.zeros_like(z).scatter(-1, kept, 1.0)
        return mlp.down_proj(z)

    return forward


def test_a_copy_that_cannot_rank_is_refused():
    with pytest.raises(ConfigError, match="step_probe='int4' has no meaning with decode='sticky'"):
        pp_fx.ProbePruningConfig(decode="sticky", step_probe="int4")
    with pytest.raises(ConfigError, match="step_probe='int2'"):
        pp_fx.ProbePruningConfig(decode="step", step_probe="int2")


def test_generate_in_all_its_modes():
    model = pp_fx.transform(tiny_llama(), config(decode_ratio=0.3))
    prompt = IDS[:1, :40]
    greedy = model.generate(prompt, max_new_tokens=8, do_sample=False)
    for changes in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, **changes), greedy)
    assert model.generate(prompt, max_new_tokens=8, num_beams=3, do_sample=False).shape == greedy.shape


def test_saved_loaded_and_undone(tmp_path):
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    weight = model.model.layers[1].mlp.down_proj.weight
    pp_fx.transform(model, config())
    assert weight.t().is_contiguous(), "rows of the transpose are read in place"
    expected = run(model, [1, 2])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).to(DEVICE)
    torch.testing.assert_close(run(again, [1, 2]), expected)
    pp_fx.restore(model)
    assert weight.is_contiguous()
    assert torch.equal(run(model, [1, 2]), run(dense, [1, 2]))


def test_gradients_flow_through_a_step():
    model = pp_fx.transform(tiny_llama(), config())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :40], past_key_values=cache)
    model(IDS[:, 40:42], past_key_values=cache).logits.sum().backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad.abs().sum() > 0


def test_loaded_weights_are_read_from_the_next_step_on():
    model = pp_fx.transform(tiny_llama(), config())
    other = tiny_llama(seed=5)
    model.load_state_dict(other.state_dict())
    expected = run(pp_fx.transform(other, config()), [1, 2])
    torch.testing.assert_close(run(model, [1, 2]), expected, atol=1e-5, rtol=1e-5)


def test_an_mlp_that_cannot_step_is_named():
    model = build("Mixtral")
    with pytest.warns(UserWarning, match="pp_fx leaves mlp dense in some layers"):
        pp_fx.transform(model, config())


def test_a_ratio_without_steps_is_refused():
    with pytest.raises(ConfigError, match=r"decode_ratio=0\.3 has no meaning with decode='sticky'"):
        pp_fx.ProbePruningConfig(decode="sticky", decode_ratio=0.3)
    with pytest.raises(ConfigError, match="decode_ratio=2"):
        pp_fx.ProbePruningConfig(decode="step", decode_ratio=2)
    with pytest.raises(ConfigError, match="decode_ratio names 2 layers, the model has 3"):
        pp_fx.transform(tiny_llama(), config(decode_ratio=(0.1, 0.2)))
    given = config(decode_ratio=(0.0, 0.2, 0.4))
    assert pp_fx.ProbePruningConfig.from_json(given.to_json()) == given
