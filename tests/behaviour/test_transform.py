import copy
import dataclasses
import importlib

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, DynamicCache, T5Config, T5ForConditionalGeneration

import pp_fx
from pp_fx import errors
from pp_fx.cache import selections_on
from pp_fx.rewrite.layer import ProbePrunedLayer
from pp_fx.runtime.state import states_of
from tests.helpers.families import build
from tests.helpers.models import tiny_llama
from tests.helpers.zeroed import transformed

PRUNED = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, decode="sticky")
DENSE = pp_fx.ProbePruningConfig(mlp_ratio=0.0, attention_ratio=0.0)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 4}, {"bias": True}, {"tied": True}])
def test_ratio_zero_is_exact(shape, dtype, attention, ids):
    model = tiny_llama(attention=attention, **shape).to(dtype)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    dense = [logits(model, ids), logits(model, ids, attention_mask=mask)]
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    pp_fx.transform(model, DENSE)
    assert torch.equal(logits(model, ids), dense[0])
    assert torch.equal(logits(model, ids, attention_mask=mask), dense[1])
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), tokens)


def test_pruning_changes_the_logits_and_restore_brings_them_back(llama, ids):
    dense = logits(llama, ids)
    layers = list(llama.model.layers)
    strides = {n: p.stride() for n, p in llama.named_parameters()}
    assert pp_fx.transform(llama, PRUNED) is llama
    assert pp_fx.is_transformed(llama)
    assert not torch.allclose(logits(llama, ids), dense, atol=1e-2)
    assert pp_fx.restore(llama) is llama
    assert not pp_fx.is_transformed(llama)
    assert torch.equal(logits(llama, ids), dense)
    assert list(llama.model.layers) == layers
    assert {n: p.stride() for n, p in llama.named_parameters()} == strides
    assert not [k for layer in layers for k in vars(layer) if k.startswith("pp_")]


def test_restore_reaches_into_a_wrapper_and_transform_refuses_one(llama, ids):
    dense = logits(llama, ids)
    compiled = torch.compile(pp_fx.transform(llama, PRUNED), backend="eager")
    assert pp_fx.explain(compiled).layers == pp_fx.explain(llama).layers
    assert pp_fx.restore(compiled) is compiled
    assert not {"save_pretrained", "pp_fx_info"} & {*vars(llama), *vars(llama.model)}
    assert torch.equal(logits(llama, ids), dense)
    with pytest.raises(errors.StateError, match=r"torch\.compile\(transform"):
        pp_fx.transform(compiled, PRUNED)


def test_state_dict_keeps_names_and_shapes_and_layers_keep_their_class(llama):
    before = {k: v.shape for k, v in llama.state_dict().items()}
    original = type(llama.model.layers[0])
    pp_fx.transform(llama, PRUNED)
    assert {k: v.shape for k, v in llama.state_dict().items()} == before
    assert all(isinstance(layer, original) for layer in llama.model.layers)
    assert len({type(layer) for layer in llama.model.layers}) == 1  # one class and one graph per structure


@pytest.mark.parametrize("ranking", ["residual", "outlier"])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_dense_checkpoint_equals_transforming_it(llama, ids, assign, ranking):
    config = dataclasses.replace(PRUNED, probe=pp_fx.ProbeConfig(ranking=ranking))
    other = tiny_llama(seed=5)
    pp_fx.transform(llama, config)
    llama.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    pp_fx.transform(other, config)
    torch.testing.assert_close(logits(llama, ids), logits(other, ids))
    for ours, theirs in zip(states_of(llama), states_of(other), strict=True):
        assert (ours.reach is None) == (ranking == "residual" or not ours.prunes)
        torch.testing.assert_close(ours.reach, theirs.reach)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_of_a_cpu_lie_as_before(llama, assign):
    """Calls that run dense must take as long as the original's; results would not tell."""
    dense = copy.deepcopy(llama)
    model = pp_fx.transform(llama, PRUNED)
    held = {
        name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in dense.state_dict().items()
    }
    model.load_state_dict(held, assign=assign)
    assert all(layer.mlp.down_proj.weight.is_contiguous() for layer in model.model.layers[1:])


def test_output_projections_lie_transposed_elsewhere(llama):
    """What is gathered are contiguous rows; a device without data stands for an accelerator."""
    model = pp_fx.transform(llama, PRUNED).to("meta")
    assert all(layer.mlp.down_proj.weight.t().is_contiguous() for layer in model.model.layers[1:])
    assert model.model.layers[0].mlp.down_proj.weight.is_contiguous()
    assert model.model.layers[1].mlp.up_proj.weight.is_contiguous()


def test_to_dtype_keeps_statistics_in_fp32_and_equals_transforming_later(llama, ids):
    other = copy.deepcopy(llama).to(torch.bfloat16)
    pp_fx.transform(llama, PRUNED).to(torch.bfloat16)
    pp_fx.transform(other, PRUNED)
    floats = {n: b for s in states_of(llama) for n, b in s.named_buffers() if b.is_floating_point()}
    assert floats
    assert all(b.dtype == (torch.bfloat16 if n == "directions" else torch.float32) for n, b in floats.items())
    assert torch.equal(logits(llama, ids), logits(other, ids))


def test_deepcopy_is_independent(llama, ids):
    pp_fx.transform(llama, PRUNED)
    copied = copy.deepcopy(llama)
    untouched = [b.clone() for s in states_of(copied) for b in s.buffers()]
    expected = logits(llama, ids)
    assert all(
        torch.equal(a, b) for a, b in zip(untouched, [b for s in states_of(copied) for b in s.buffers()], strict=True)
    )
    assert torch.equal(logits(copied, ids), expected)
    pp_fx.restore(copied)
    assert pp_fx.is_transformed(llama)


def test_padding_content_changes_nothing(llama, ids):
    pp_fx.transform(llama, PRUNED)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[1, -9:] = 0
    other = torch.where(mask == 0, 5, ids)
    real = mask.bool()
    with pp_fx.history_frozen(llama):
        a, b = (logits(llama, x, attention_mask=mask)[real] for x in (ids, other))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_same_call_twice_with_frozen_history_is_equal(llama, ids):
    pp_fx.transform(llama, PRUNED)
    logits(llama, ids)
    with pp_fx.history_frozen(llama):
        assert torch.equal(logits(llama, ids), logits(llama, ids))


def test_hooks_on_layers_still_fire(llama, ids):
    seen = []
    llama.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out.shape))
    pp_fx.transform(llama, PRUNED)
    logits(llama, ids)
    assert seen == [torch.Size((3, 40, 64))]


def test_transform_under_inference_mode_leaves_no_inference_tensors(llama, ids):
    with torch.inference_mode():
        pp_fx.transform(llama, PRUNED)
        pp_fx.calibrate(llama, ids, progress=False)
    assert not any(b.is_inference() for s in states_of(llama) for b in s.buffers())
    assert not any(p.is_inference() for p in llama.parameters())
    logits(llama, ids)


def test_a_failed_transform_leaves_the_model_untouched(llama, ids, monkeypatch):
    module = importlib.import_module("pp_fx.rewrite.transform")
    dense, real_install, calls = logits(llama, ids), module.install, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("stop")
        real_install(*args)

    monkeypatch.setattr(module, "install", failing)
    with pytest.raises(RuntimeError, match="stop"):
        pp_fx.transform(llama, PRUNED)
    assert not any(isinstance(m, ProbePrunedLayer) for m in llama.modules())
    assert torch.equal(logits(llama, ids), dense)


def test_bad_models_are_refused_by_name(llama):
    bert = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    with pytest.raises(errors.UnsupportedModelError, match="BertForMaskedLM"):
        pp_fx.transform(BertForMaskedLM(bert).eval())
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=50))
    with pytest.raises(errors.UnsupportedModelError, match="encoder-decoder"):
        pp_fx.transform(t5.eval())
    with pytest.raises(errors.UnsupportedModelError, match="Linear"):
        pp_fx.transform(torch.nn.Linear(2, 2))
    with pytest.raises(errors.UnsupportedModelError, match="meta"):
        pp_fx.transform(copy.deepcopy(llama).to("meta"))


def test_bad_states_are_refused_with_the_remedy(llama):
    with pytest.raises(errors.StateError, match=r"pp_fx\.transform"):
        pp_fx.restore(llama)
    with pytest.raises(errors.ConfigError, match="skip_layers=3"):
        pp_fx.transform(llama, pp_fx.ProbePruningConfig(skip_layers=3))  # of three
    with pytest.raises(errors.ConfigError, match="'fast'"):
        pp_fx.transform(llama, "fast")
    pp_fx.transform(llama, PRUNED)
    with pytest.raises(errors.StateError, match=r"pp_fx\.restore"):
        pp_fx.transform(llama, PRUNED)
    dropout = tiny_llama(attention_dropout=0.1).train()
    with pytest.raises(errors.StateError, match=r"model\.eval"):
        pp_fx.transform(dropout, PRUNED)
    hooked = tiny_llama()
    hooked.model.layers[2].mlp.register_forward_hook(lambda *a: None)
    with pytest.raises(errors.UnsupportedModelError, match=r"layer 2\.mlp"):
        pp_fx.transform(hooked, PRUNED)


def test_attention_weights_cannot_be_had_and_say_so(ids):
    model = tiny_llama(attention="eager")
    pp_fx.transform(model, PRUNED)
    with pytest.raises(errors.StateError, match=r"output_attentions=True.*pp_fx\.restore"):
        logits(model, ids, output_attentions=True)
    with pytest.raises(errors.StateError, match="output_attentions=True"):
        model.base_model(ids, output_attentions=True)
    pp_fx.restore(model)
    assert len(model(ids, output_attentions=True).attentions) == 3


def test_a_model_of_which_nothing_is_pruned_says_so():
    """Experts stay dense, and attention is off by default."""
    with pytest.warns(UserWarning, match="prunes nothing of this model; attention can be pruned here"):
        pp_fx.transform(build("Mixtral"), pp_fx.ProbePruningConfig(skip_layers=0))


def test_double_precision(ids):
    model = pp_fx.transform(tiny_llama().double(), PRUNED)
    assert torch.isfinite(logits(model, ids)).all()


def test_a_copy_with_other_weights_selects_anew(ids):
    """Both have loaded weights once; the selection of one says nothing of the other."""
    model = pp_fx.transform(tiny_llama(), PRUNED)
    other = copy.deepcopy(model)
    for each, scale in ((model, 1.0), (other, 0.5)):
        each.load_state_dict({name: value * scale for name, value in each.state_dict().items()})
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = selections_on(cache).layers[2]["mlp"].version
        other(ids[:, :1], past_key_values=cache)
    assert selections_on(cache).layers[2]["mlp"].version != before


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("history", ["channel", "position"])
@pytest.mark.parametrize(("attention", "ranking"), [("queries", "residual"), ("rows", "residual"), ("queries", "even")])
def test_padding_on_either_side_changes_nothing(llama, ids, attention, ranking, history, calibrated):
    """As transformers' test_left_padding_compatibility, and for samples that are padded by unlike amounts."""
    probe = pp_fx.ProbeConfig(attention=attention, ranking=ranking, sample_fraction=0.7)
    pp_fx.transform(llama, pp_fx.ProbePruningConfig(**{**PRUNED.to_dict(), "probe": probe, "history": history}))
    if calibrated:
        pp_fx.calibrate(llama, ids, progress=False)
    ids = ids.clone()
    lengths = (40, 33, 38)
    found = []
    with pp_fx.history_frozen(llama):
        for left in (0, 1, 9):
            for right in (0, 3):
                width = left + 40 + right
                given, mask = torch.full((3, width), 5, device=ids.device), torch.zeros((3, width), dtype=torch.long)
                for row, length in enumerate(lengths):
                    start = width - right - length if left else 0
                    given[row, start : start + length] = ids[row, :length]
                    mask[row, start : start + length] = 1
                mask = mask.to(ids.device)
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                found.append(logits(llama, given, attention_mask=mask, position_ids=positions)[mask.bool()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Gemma2", "Mixtral", "GPT-OSS"])
def test_attention_weights_where_all_heads_run(family, ids):
    original = build(family)
    original.set_attn_implementation("eager")
    with torch.no_grad():
        expected = original(ids, output_attentions=True).attentions
        model = transformed(original, DENSE)
        found = model(ids, output_attentions=True).attentions
        assert len(expected) == 3
        assert all(map(torch.equal, found, expected))
        assert not model(ids).attentions
    pp_fx.restore(model)
    model = transformed(model, pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1))
    with torch.no_grad():
        told = model.generate(ids, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    assert [len(step) for step in told.attentions] == [3] * 3


@pytest.mark.parametrize("family", ["GPT-J", "Falcon", "Bloom"])
def test_attention_weights_of_attention_that_is_written_out_are_refused(family, ids):
    model = transformed(build(family), DENSE)
    with pytest.raises(errors.StateError, match="output_attentions=True cannot be served"):
        model(ids, output_attentions=True)
