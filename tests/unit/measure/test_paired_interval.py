"""The interval of paired answers: against a value computed by hand, and what must hold of any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_fx.errors import InputError
from pp_fx.measure.paired_interval import paired_interval


def test_by_hand():
    """64 problems, 20 solved before alone, 3 after alone: cells 20.5 and 3.5 of 66, -17 / 66 +- 1.96 * 0.067115."""
    before = [True] * 20 + [False] * 3 + [True] * 41
    after = [False] * 20 + [True] * 44
    assert paired_interval(before, after) == pytest.approx((-24.9037, -8.0660), abs=1e-3)


def test_another_implementation():
    """The example of `diffpropci.mp` in the R package PropCIs 0.3, with its output."""
    before, after = [True] * 40 + [False] * 20 + [True] * 100, [False] * 40 + [True] * 120
    assert paired_interval(before, after) == pytest.approx((160 * -0.21601726, 160 * -0.03089632), abs=1e-5)


PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80)


@given(PAIRS)
def test_it_holds_the_difference_and_mirrors(pairs):
    before, after = zip(*pairs, strict=True)
    low, high = paired_interval(before, after)
    assert -len(pairs) <= low < high <= len(pairs)
    assert low <= sum(after) - sum(before) <= high
    assert paired_interval(after, before) == pytest.approx((-high, -low))


@given(PAIRS)
def test_more_problems_say_more_about_each(pairs):
    before, after = zip(*pairs, strict=True)
    few, many = (paired_interval(before * n, after * n) for n in (1, 4))
    assert (many[1] - many[0]) / 4 < few[1] - few[0]


def test_a_lower_level_is_narrower():
    before, after = [True, True, False, False], [True, False, True, False]
    wide, narrow = paired_interval(before, after), paired_interval(before, after, level=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_answers_must_pair(before, after):
    with pytest.raises(InputError, match="one for each problem"):
        paired_interval(before, after)
