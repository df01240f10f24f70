"""What a rewritten layer would bypass or select twice is refused: adapters, hooks, recomputation, paged caches."""

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import pp_fx
from pp_fx.errors import StateError

from .conftest import tiny_llama

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


def test_continuous_batching_is_refused(model, ids, capfd):
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    # transformers runs it in a thread, and logs what is raised there
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    found = model.generate_batch([ids[0].tolist()], settings, small, progress_bar=False)
    assert not any(result.generated_tokens for result in found.values())
    assert "generate_batch (continuous batching) cannot be served" in str(found) + capfd.readouterr().err
    assert model.generate(ids, generation_config=settings).shape[1] == ids.shape[1] + 2
