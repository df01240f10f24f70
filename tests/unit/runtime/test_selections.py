"""A selection and what is kept for it."""

import torch

from pp_fx.methods import Compensation
from pp_fx.runtime.compact import CompactLinear
from pp_fx.runtime.selections import Selection, compact_bytes, forget, put_selections, selections_on


class Cache:
    """Selections need no more of a KV cache than that it is an object."""


def kept(*units):
    return torch.tensor(units)


def test_a_new_choice_is_due_anew():
    selection = Selection(kept(0, 2), kept(0, 2), 1, holds=True)
    selection.read_weights(compact=True, in_place=False)
    selection.hold_inputs(torch.ones(2, 3), None, [2])
    selection.hold_output(torch.ones(3, 2), torch.zeros(3))
    assert not selection.inputs_due
    assert not selection.output_due
    units = kept(1, 3)
    selection.choose(units, units, 2, None)
    assert selection.inputs_due
    assert selection.output_due
    assert selection.uncompensated
    assert selection.columns is selection.kept
    assert selection.kept.tolist() == [1, 3]


def test_a_held_choice_is_written_into_the_memory_of_the_one_before():
    first = kept(0, 2)
    selection = Selection(first, first, 1, holds=True)
    address = selection.kept.data_ptr()
    assert address != first.data_ptr()
    second = kept(1, 3)
    selection.choose(second, second, 1, None)
    assert selection.kept.data_ptr() == address
    made = selection.compensate(Compensation(torch.ones(4), None), folds=True)
    assert selection.compensate(Compensation(torch.zeros(4), None), folds=True).vector is made.vector


def test_a_choice_that_does_not_count_leaves_the_old_one():
    units = kept(0, 2)
    selection = Selection(units, units, 1)
    other = kept(1, 3)
    selection.choose(other, other, 1, torch.tensor(False))
    assert selection.kept.tolist() == [0, 2]


def test_given_compact_weights_are_due_no_more():
    inputs = [CompactLinear(torch.ones(2, 3), None)]
    selection = Selection.given(kept(0), kept(0, 1), 1, inputs, CompactLinear(torch.ones(3, 2), None))
    assert selection.exports
    assert selection.compacts
    assert [selection.inputs_due, selection.output_due, selection.uncompensated] == [False] * 3
    assert selection.inputs == [(inputs[0], [2])]


def test_selections_of_another_transform_are_replaced_and_forgotten_ones_wait():
    cache = Cache()
    assert selections_on(cache) is None
    held = put_selections(cache, owner=1)
    assert put_selections(cache, owner=1) is held
    held.layers[0] = {"mlp": Selection(kept(0), kept(0), 1)}
    held.layers[0]["mlp"].hold_output(torch.ones(3, 2), None)
    assert compact_bytes(cache) > 0
    forget(cache)
    assert not held.layers[0]["mlp"].current
    assert put_selections(cache, owner=2) is not held
