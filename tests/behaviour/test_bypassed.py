"""What a rewritten layer would bypass or select twice is refused: adapters, hooks, recomputation."""

import copy
import unittest.mock

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import pp_fx
from pp_fx.capture.reads import watch
from pp_fx.errors import PpFxError, StateError
from tests.helpers.families import build
from tests.helpers.models import tiny_llama
from tests.helpers.zeroed import transformed

CONFIG = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1)


@pytest.fixture
def model():
    return pp_fx.transform(tiny_llama(), CONFIG)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_a_hook_inside_a_layer(model, ids, compiled, copied):
    other = copy.deepcopy(model)
    if copied:
        model, other = other, model
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *given: None)
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    with pytest.raises(Exception if compiled else StateError, match=r"forward hook since pp_fx\.transform|Observed"):
        forward(ids)
    other(ids)
    hook.remove()
    torch._dynamo.reset()
    forward(ids)


def test_an_adapter_in_place_of_a_projection(model, ids):
    import peft

    settings = peft.LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    with pytest.raises(StateError, match=r"module down_proj \(Linear\) of a decoder layer was replaced"):
        adapted(ids)
    pp_fx.restore(adapted)
    with pytest.warns(UserWarning, match="leaves mlp dense"):
        pp_fx.transform(adapted, CONFIG)
    assert torch.isfinite(adapted(ids).logits).all()


def _half(mlp):
    return lambda x: 0.5 * type(mlp).forward(mlp, x)


CHANGES = {
    "forward of a module": (lambda m: setattr(m.model.layers[1].mlp, "forward", _half(m.model.layers[1].mlp)), "mlp"),
    "class of a module": (
        lambda m: setattr(m.model.layers[0].mlp, "__class__", type("Other", (LlamaMLP,), {})),
        "Other",
    ),
    "scaling": (lambda m: setattr(m.model.layers[2].self_attn, "scaling", 0.5), r"scaling of a LlamaAttention.* 0\.5"),
    "epsilon": (lambda m: setattr(m.model.layers[0].input_layernorm, "variance_epsilon", 0.1), "variance_epsilon"),
    "a deleted attribute": (lambda m: delattr(m.model.layers[1].self_attn, "scaling"), "scaling"),
    "head_dim": (lambda m: setattr(m.model.layers[0].self_attn, "head_dim", 8), "head_dim"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("copied", [False, True])
def test_what_the_graph_holds_must_stay(model, ids, name, copied):
    change, message = CHANGES[name]
    other = copy.deepcopy(model)
    if copied:
        model, other = other, model
    change(model)
    with pytest.raises(StateError, match=message):
        model(ids)
    other(ids)
    pp_fx.restore(model)


def test_a_forward_of_a_class_replaced(model, ids, monkeypatch):
    original = LlamaMLP.forward
    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", lambda self, x: 0.5 * original(self, x))
        with pytest.raises(StateError, match="forward of class LlamaMLP was replaced"):
            model(ids)
    model(ids)


@pytest.mark.parametrize("switch", ["disable_adapter_layers", "scale"])
def test_an_adapter_that_was_there_is_switched(ids, switch):
    import peft

    settings = peft.LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_llama(), settings).eval()
    with pytest.warns(UserWarning, match="leaves mlp dense"):
        pp_fx.transform(adapted, CONFIG)
    adapted(ids)
    if switch == "scale":
        for module in adapted.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling["default"] *= 0.5
    else:
        adapted.disable_adapter_layers()
    with pytest.raises(StateError, match=r"(scaling|_disable_adapters) of a Linear"):
        adapted(ids)


@pytest.mark.parametrize(
    "family",
    [
        "GPT-2",
        "Falcon, alibi",
        "Mixtral",
        "Phi3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Llama", "Bloom", "OLMo", "Granite")),
    ],
)
def test_every_attribute_that_a_layer_reads_is_watched(family, ids):
    """The oracle reads nothing: each plain attribute of the original's modules is changed in turn.

    Where the original's logits change, the transformed model's call must change with them, or be refused.
    """
    original = build(family)
    model = transformed(copy.deepcopy(original), pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0))
    dense, checked = outcome(original, ids), 0
    for path, module in layer_modules(original):
        twin = model.get_submodule(path)
        for name, value in list(vars(module).items()):
            if name in vars(torch.nn.Module()) or name == "layer_idx" or not isinstance(value, int | float):
                continue
            if isinstance(module, torch.nn.Dropout):
                continue
            other = not value if isinstance(value, bool) else type(value)(value * 3 + 1)
            setattr(module, name, other)
            setattr(twin, name, other)
            expected, got = outcome(original, ids), outcome(model, ids)
            setattr(module, name, value)
            setattr(twin, name, value)
            if not is_equal(expected, dense):
                checked += 1
                refused = isinstance(got, PpFxError)
                both_fail = isinstance(expected, Exception) and isinstance(got, Exception)
                assert refused or both_fail or is_equal(got, expected), (path, name, got)
    assert checked


def layer_modules(model):
    holder = max((m for m in model.named_modules() if isinstance(m[1], torch.nn.ModuleList)), key=lambda m: len(m[1]))[
        0
    ]
    return [(n, m) for n, m in model.named_modules() if n.startswith(f"{holder}.1")]


def outcome(model, ids):
    """Logits, or what the call raises."""
    try:
        with torch.no_grad():
            return model(ids).logits
    except Exception as error:
        return error


def is_equal(one, other):
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)


def test_dropout_is_refused_in_training(ids):
    model = transformed(build("GPT-2"), pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.transformer.h[0].mlp.dropout.p = 0.1
    model(ids)
    model.train()
    with pytest.raises(StateError, match=r"training mode and dropout \(Dropout\) of a decoder layer has p=0\.1"):
        model(ids)
    model.transformer.h[0].mlp.dropout.p = 0.0
    model(ids)


def test_hooks_that_transformers_leaves_behind_are_no_obstacle(ids):
    """It listens to attention modules from the first time on that outputs are collected."""
    model = tiny_llama()
    model(ids, output_hidden_states=True)
    pp_fx.transform(model, CONFIG)
    with torch.no_grad(), pp_fx.history_frozen(model):
        states = model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(model(ids, output_hidden_states=True).hidden_states[-1], states[-1])
        model(ids)


def test_gradient_checkpointing_needs_a_frozen_history(model, ids):
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.gradient_checkpointing_enable()
    with pytest.raises(StateError, match="gradient_checkpointing_disable"):
        model(ids, labels=ids, use_cache=False)
    with torch.no_grad():
        model(ids)

    def gradients(checkpointing):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        (twin.gradient_checkpointing_enable if checkpointing else twin.gradient_checkpointing_disable)()
        with pp_fx.history_frozen(twin):
            twin(ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in twin.parameters()])

    torch.testing.assert_close(gradients(True), gradients(False))


def test_a_routers_noise_is_refused_in_training(ids):
    model = build("Mixtral")
    for module in model.modules():
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.1
    transformed(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0)).train()
    with pytest.raises(StateError, match=r"jitter_noise=0\.1"):
        model(ids)


def test_router_logits_are_refused_by_name(ids):
    model = build("Mixtral")
    model.config.output_router_logits = True
    transformed(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0))
    with pytest.raises(StateError, match="output_router_logits=True"):
        model(ids)
    model(ids, output_router_logits=False)


def test_what_others_read_while_a_layer_is_captured_does_not_count(ids):
    """Only capture's own copy is watched: no class of torch or transformers is touched."""
    model = tiny_llama()
    before = {cls: dict(vars(cls)) for cls in (torch.nn.Module, type(model.config), type(model.model.layers[0].mlp))}

    with unittest.mock.patch("pp_fx.capture.trace.watch", wraps=watch) as watched:
        pp_fx.transform(model, CONFIG)
    assert watched.call_count == 1
    assert all(dict(vars(cls)) == was for cls, was in before.items())
    model.config.use_cache = False  # the model reads it, its layers do not
    model(ids)


def test_hooks_on_all_modules_are_not_baked_in(ids):
    model = tiny_llama()
    with torch.no_grad():
        dense = model(ids).logits
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, given, out: torch.zeros_like(out) if isinstance(module, torch.nn.Linear) else None
        )
        try:
            pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0))
            assert torch.nn.modules.module._global_forward_hooks
        finally:
            handle.remove()
        assert torch.equal(model(ids).logits, dense)
