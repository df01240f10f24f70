"""Calls of a graph that write are declared (`BlockGraph.effects`): others may be merged or dropped."""

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache

import pp_fx
from pp_fx.passes import BlockGraph
from pp_fx.rewrite.layer import compile_graph, layers_of
from pp_fx.runtime import model_calls, shard_sum
from pp_fx.runtime.selections import selections_on
from pp_fx.runtime.state import states_of
from tests.helpers.continuous import serve
from tests.helpers.families import VOCABULARY, build
from tests.helpers.zeroed import transformed

IDS = torch.randint(2, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "re-probing": {"decode": "probe", "reprobe_every": 3},
    "sticky": {"compensation_min_tokens": 1},
    "indices alone": {"compact_megabytes": 0},
    "by step": {"decode": "step"},
}
FAMILIES = ("Llama", "Phi3", "Falcon")  # separate and fused projections, and an attention that stays a module


def pruned(family, changes):
    config = pp_fx.ProbePruningConfig(
        mlp_ratio=0.4, attention_ratio=0.3, skip_layers=0, round_to=1, **{"decode": "sticky", **changes}
    )
    return transformed(build(family), config)


def run(model):
    """A prompt and decode steps; logits of all."""
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in (IDS, *IDS[:, :6].split(1, 1)):
            found.append(model(part, past_key_values=cache).logits)
    return torch.cat(found, 1)


def state(model, cache):
    """Identity and version of whatever may be written to."""

    def mark(value):
        if isinstance(value, torch.Tensor):
            return id(value), value._version, tuple(value.shape)
        if isinstance(value, list | tuple):
            return tuple(map(mark, value))
        if isinstance(value, dict):
            return tuple((key, mark(v)) for key, v in value.items())
        return mark(vars(value)) if type(value).__module__.startswith("pp_fx") else repr(value)

    history = [buffer for layer in layers_of(model) for s in layer.states().values() for buffer in s.history().values()]
    layers = getattr(cache, "layers", ())  # of an engine's pages none are looked at
    held = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    return mark(history), mark(held), mark(selections_on(cache))


def writers_of_generation(model, own):
    """Names of the functions that the graphs call and that wrote, in a prompt and its decode steps.

    `own`: the prompt ran before, on a cache that the model made itself; decoding then asks for compact weights.
    """
    with torch.no_grad():
        cache = model(IDS).past_key_values if own else DynamicCache(config=model.config)

    def run():
        with torch.no_grad():
            for part in (*[IDS] * (not own), *IDS[:, :6].split(1, 1)):
                model(part, past_key_values=cache)

    return writers(model, run, lambda: cache)


def writers_of_an_engine(model):
    """Likewise under continuous batching, of what lies with the pages."""
    pages = []
    model.model.register_forward_pre_hook(lambda m, args, kwargs: pages.append(kwargs["cache"]), with_kwargs=True)
    wanted = [([7], 9), (IDS[0].tolist(), 6)]
    return writers(model, lambda: serve(model, wanted), lambda: pages[-1])


def writers(model, run, cache):
    found = set()

    def watched(name, function):
        def call(*args, **kwargs):
            before = state(model, cache())
            result = function(*args, **kwargs)
            if state(model, cache()) != before:
                found.add(name)
            return result

        return call

    undo = []
    for layer in layers_of(model):
        namespace = inspect.unwrap(type(layer).forward).__globals__
        for node in layer.graph.nodes:
            for name, value in list(namespace.items()):
                if node.op == "call_function" and value is node.target:
                    undo.append((namespace, name, value))
                    namespace[name] = watched(node.target.__name__, value)
    try:
        run()
    finally:
        for namespace, name, value in undo:
            namespace[name] = value
    return found


def test_whatever_writes_is_declared_and_whatever_is_declared_writes():
    found = set()
    for family in FAMILIES:
        for changes in CONFIGS.values():
            found |= writers_of_generation(pruned(family, changes), own=False)
        found |= writers_of_generation(pruned(family, {}), own=True)
    rolling = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=0, decode="rolling", reprobe_every=3)
    found |= writers_of_an_engine(transformed(build("Llama"), rolling))
    # attention gives its weights to hooks, which nothing of the state shows; shards are summed in the output's memory
    others = {model_calls.attention, model_calls.pruned_attention, shard_sum.sum_of_shards}
    assert found == {f.__name__ for f in BlockGraph.effects - others}


def test_attention_that_is_asked_for_its_weights_does_more_than_return_a_value():
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=0)
    model = transformed(build("Llama", "eager"), config)
    targets = {node.target for layer in layers_of(model) for node in layer.graph.nodes}
    assert targets & BlockGraph.effects >= {model_calls.pruned_attention}
    assert len(model(IDS, output_attentions=True).attentions) == len(layers_of(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_calls_may_be_merged_and_dead_ones_dropped(family, name):
    model = pruned(family, CONFIGS[name])
    again = copy.deepcopy(model)
    expected = run(model)
    merged = {}
    for layer in layers_of(again):
        if type(layer) not in merged:
            graph = doubled(layer.graph)
            count = len(graph.nodes)
            merge_equal_calls(graph)
            BlockGraph(graph).drop_unused()
            graph.lint()
            assert len(graph.nodes) < count
            merged[type(layer)] = type(
                type(layer).__name__, (type(layer),), {"forward": compile_graph(graph, "merged")}
            )
        layer.__class__ = merged[type(layer)]
    assert torch.equal(run(again), expected)
    for one, other in zip(states_of(again), states_of(model), strict=True):
        assert all(map(torch.equal, one.history().values(), other.history().values()))


def doubled(graph):
    """The graph with a second, equal call for every one without effects, and users for both."""
    new = copy.deepcopy(graph)
    for node in list(new.nodes):
        if node.op == "call_function" and node.target not in BlockGraph.effects and len(node.users) > 1:
            with new.inserting_after(node):
                twin = new.node_copy(node)
            next(iter(node.users)).replace_input_with(node, twin)
    return new


def merge_equal_calls(graph):
    seen = {}
    for node in list(graph.nodes):
        key = (node.op, node.target, str(node.args), str(node.kwargs))
        if node.op == "call_function" and node.target not in BlockGraph.effects:
            if key in seen:
                node.replace_all_uses_with(seen[key])
            seen.setdefault(key, node)
