"""Graph shape: how often each pass matches, and that the graph reads like the paper."""

import pytest
import torch

import pp_fx
from pp_fx.capture.calls import record_calls
from pp_fx.capture.layers import find_layers
from pp_fx.capture.trace import capture_layer
from pp_fx.errors import PassError
from pp_fx.groups.find import find_groups
from pp_fx.passes import BlockGraph, Cut, FindChannelGroups, FreeHeadCount, InsertSelection, probe_pruning
from pp_fx.runtime.gather import gather_columns, gather_rows
from pp_fx.runtime.shard_sum import sum_of_shards
from pp_fx.runtime.split import join_rows
from pp_fx.runtime.step import linear
from pp_fx.shards import local
from tests.helpers.families import build
from tests.helpers.models import tiny_llama


def captured(model):
    _, layers = find_layers(model)
    calls = [record_calls(model, layers, *shape)[0] for shape in ((3, 7), (5, 11))]
    return capture_layer(model, layers[0], tuple(calls))


def test_match_counts(llama):
    results = probe_pruning()(BlockGraph(captured(llama)))
    matches = {name: r.matches for name, r in results.items()}
    assert matches.pop("Cleanup") >= 0
    assert matches == {
        "NormalizeLinears": 0,
        "FreeHeadCount": 0,  # nothing to free: Llama writes -1 for its heads
        "FindChannelGroups": 2,
        "InsertProbe": 2,
        "InsertSelection": 2,
        "GatherChannels": 5,
        "InsertCompensation": 2,
        "InsertHistory": 2,
        "InsertStep": 1,
        "InsertSplit": 1,
        "SumShards": 0,  # of tensor parallel layers
        "LocalizeWeights": 0,
        "StepLinears": 6,  # keys, values, and the products of both groups
    }


def test_a_shard_s_outputs_are_summed_in_front_of_their_bias():
    model = tiny_llama(bias=True)
    parameters = {n for n, p in model.model.layers[0].named_parameters() if "norm" not in n}
    summed = frozenset({"self_attn.o_proj.weight", "mlp.down_proj.weight"})
    block = BlockGraph(captured(model), cut=Cut(frozenset(parameters), summed, 2))
    results = probe_pruning()(block)
    assert (results["SumShards"].matches, results["FindChannelGroups"].matches) == (2, 2)
    sums = [n for n in block.graph.nodes if n.target is sum_of_shards]
    attention, mlp = (n.args[0] for n in sums)
    assert (attention.target, mlp.target, mlp.args[2].target) == (gather_columns, join_rows, gather_columns)
    biases = attention.args[3], mlp.args[2].args[3], mlp.args[6]
    assert biases == (None, None, None), "no rank adds the bias to its part"
    for node in sums:
        (added,) = node.users
        assert added.target is torch.ops.aten.add.Tensor
        assert added.args[1].target is local
    read = [n for n in block.graph.nodes if n.op == "get_attr" and str(n.target) in parameters]
    assert all(user.target is local for n in read for user in n.users)


def test_the_graph_reads_like_the_paper(llama):
    pp_fx.transform(llama, pp_fx.ProbePruningConfig(skip_layers=0))
    names = [n.name for n in llama.model.layers[2].graph.nodes]
    expected = ["probe_rows", "probe_residual", "probe_state", "score", "kept"]
    for kind, kept in (("attention", ["q_kept", "o_kept"]), ("mlp", ["gate_kept", "up_kept", "down_kept"])):
        order = [names.index(f"{kind}_{role}") for role in expected] + [names.index(k) for k in kept]
        assert order == sorted(order)
        assert names.index(f"{kind}_history") > order[-1]
    linears = [n for n in llama.model.layers[2].graph.nodes if n.target is linear]
    gathers = [n for n in llama.model.layers[2].graph.nodes if n.target in (gather_rows, gather_columns)]
    assert (len(linears), len(gathers)) == (2, 4)  # keys and values stay whole


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (4, 1)])
def test_groups_of_mha_and_gqa(heads, kv):
    groups = find_groups(captured(tiny_llama(heads, kv)))
    assert groups.mlp.units == 96
    assert [p.label for p in groups.mlp.inputs] == ["gate", "up"]
    assert groups.mlp.output.label == "down"
    assert (groups.attention.units, groups.attention.width) == (heads, 16)
    assert list(groups.attention.kv_head) == [h * kv // heads for h in range(heads)]
    assert groups.reasons == []


def test_a_group_that_escapes_is_left_dense_with_the_reason(llama):
    graph = captured(llama)
    silu = next(n for n in graph.nodes if n.target is torch.ops.aten.silu.default)
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        total = graph.call_function(torch.ops.aten.sum.default, (silu,))
        output.args = (graph.call_function(torch.ops.aten.add.Tensor, (output.args[0], total)),)
    groups = find_groups(graph)
    assert groups.mlp is None
    assert any("also used by sum" in r for r in groups.reasons)


def test_what_mixes_channels_is_left_dense_with_the_reason(llama):
    graph = captured(llama)
    mul = next(n for n in graph.nodes if n.target is torch.ops.aten.silu.default)
    with graph.inserting_after(mul):
        mixed = graph.call_function(torch.ops.aten.softmax.int, (mul, -1))
    mixed.meta["val"] = mul.meta["val"]
    mul.replace_all_uses_with(mixed, delete_user_cb=lambda user: user is not mixed)
    groups = find_groups(graph)
    assert groups.mlp is None
    assert any("not pointwise" in r for r in groups.reasons)


def test_where_heads_are_mixed_before_the_core_the_query_runs_whole(llama):
    graph = captured(llama)
    query = find_groups(graph).attention.inputs[0].node
    with graph.inserting_after(query):
        flipped = graph.call_function(torch.ops.aten.flip.default, (query, [2]))
    flipped.meta["val"] = query.meta["val"]
    query.replace_all_uses_with(flipped, delete_user_cb=lambda user: user is not flipped)
    groups = find_groups(graph)
    assert (groups.attention.inputs, len(groups.attention.cut)) == ((), 1)
    assert any("the query projection runs whole (something mixes the heads" in r for r in groups.reasons)


def test_a_head_count_written_as_a_constant_is_freed():
    model = build("OPT")
    graph = captured(model)
    assert find_groups(graph).attention.inputs == ()
    assert FreeHeadCount()(BlockGraph(graph)).matches == 1
    assert [p.label for p in find_groups(graph).attention.inputs] == ["q"]


def test_passes_out_of_order_are_refused(llama):
    block = BlockGraph(captured(llama))
    FindChannelGroups()(block)
    with pytest.raises(PassError, match="InsertSelection needs state"):
        InsertSelection()(block)


class Forgetful(InsertSelection):
    """It does not say where it put the kept units."""

    def call(self, block):
        result = super().call(block)
        for inserted in block.inserted:
            del inserted.nodes["kept"]
        return result


def test_a_pass_that_does_not_keep_its_promise_is_named_with_those_before_it(llama):
    manager = probe_pruning()
    manager.passes = [Forgetful() if isinstance(p, InsertSelection) else p for p in manager.passes]
    with pytest.raises(PassError, match="Forgetful did not insert kept of") as caught:
        manager(BlockGraph(captured(llama)))
    before = "NormalizeLinears, SumShards, FreeHeadCount, FindChannelGroups, InsertProbe"
    assert caught.value.__notes__ == [f"in the graph pass Forgetful, after {before}"]


class Roles(dict):
    """Nodes by role, with the roles that somebody read before they were set by the same pass."""

    def __init__(self, nodes):
        super().__init__(nodes)
        self.read, self.set = set(), set()

    def __getitem__(self, role):
        if role not in self.set:
            self.read.add(role)
        return super().__getitem__(role)

    def __setitem__(self, role, node):
        self.set.add(role)
        super().__setitem__(role, node)


def test_a_pass_reads_the_roles_that_it_says_and_an_earlier_one_promises_them(llama):
    block, there = BlockGraph(captured(llama)), set()
    for step in probe_pruning(pp_fx.ProbePruningConfig(decode="sticky")).passes:  # a step is there or not
        for inserted in block.inserted:
            inserted.nodes = Roles(inserted.nodes)
        step(block)
        looked = [inserted.nodes.read for inserted in block.inserted if isinstance(inserted.nodes, Roles)]
        assert set().union(*looked) == set(step.requires), type(step).__name__
        assert set(step.requires) <= there, type(step).__name__
        there |= set(step.ensures)
