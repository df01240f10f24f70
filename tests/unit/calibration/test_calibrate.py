import pytest
import torch

import pp_fx
from pp_fx.checks import learned_positions
from pp_fx.errors import InputError, StateError
from pp_fx.evaluate import evaluate
from pp_fx.runtime.state import states_of
from tests.helpers.families import build
from tests.helpers.zeroed import transformed

CONFIG = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1)


def snapshot(model):
    return [b.clone() for s in states_of(model) for b in s.buffers()]


def unchanged(model, before):
    return all(torch.equal(a, b) for a, b in zip(snapshot(model), before, strict=True))


def down_inputs(model, batches):
    """Inputs of the last down projection of the dense model, by a forward hook."""
    seen = []
    handle = model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("history", ["channel", "position"])
def test_statistics_are_those_of_the_dense_model(llama, ids, history):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:2, :20]}]
    seen = down_inputs(llama, batches)
    rows = torch.cat([seen[0][mask.bool()], seen[1].flatten(0, 1)])
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, history=history, history_length=64)
    pp_fx.transform(llama, config)
    pp_fx.calibrate(llama, batches, progress=False)
    state = llama.model.layers[-1].pp_mlp
    torch.testing.assert_close(state.mean, rows.mean(0), atol=1e-5, rtol=1e-4)
    if history == "channel":
        torch.testing.assert_close(state.energy, rows.pow(2).mean(0), atol=1e-5, rtol=1e-4)
    else:
        # positions count from the first real token: that of the first sample is in column 7
        at_30 = torch.cat([seen[0][:1, 37], seen[0][1:, 30]]).pow(2).mean(0)
        torch.testing.assert_close(state.energy[30], at_30, atol=1e-5, rtol=1e-4)
        at_3 = torch.cat([seen[0][:1, 10], seen[0][1:, 3], seen[1][:, 3]]).pow(2).mean(0)
        torch.testing.assert_close(state.energy[3], at_3, atol=1e-5, rtol=1e-4)


def test_every_kind_of_batches_gives_the_same_history(llama, ids):
    pp_fx.transform(llama, CONFIG)
    kinds = [
        ids,
        [ids[:2], ids[2:]],
        [{"input_ids": ids}],
        {"input_ids": ids},
        [{"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": "unused"}],
        [{"input_ids": row.tolist()} for row in ids],
        torch.utils.data.DataLoader(ids, batch_size=2),
    ]
    results = []
    for kind in kinds:
        pp_fx.calibrate(llama, kind, progress=False)
        for state in states_of(llama):
            if state.directions is not None:  # their signs and order may differ, the covariance that they give not
                directions = state.directions.float()
                state.directions = directions.t() @ directions
        results.append(snapshot(llama))
        for state in states_of(llama):
            if state.directions is not None:
                state.directions = torch.zeros(64, state.units * state.width)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            # directions are kept in bf16
            torch.testing.assert_close(
                a,
                b,
                **(
                    {"atol": 2e-2, "rtol": 2e-2}
                    if a.ndim == 2 and a.shape[0] == a.shape[1]
                    else {"atol": 1e-6, "rtol": 1e-4}
                ),
            )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "empty"),
        (torch.zeros(0, 4, dtype=torch.long), "empty"),
        (torch.zeros(2, 0, dtype=torch.long), "length >= 1"),
        (torch.zeros(2, 4), "integer"),
        (torch.full((2, 4), 97), "97"),
        (torch.full((2, 4), -1), "-1"),
        (3, "iterated"),
        ([None], "NoneType"),
        ("some text", "tokenizer"),
        ([{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 3)}], "attention_mask"),
        ([{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4)}], "padding"),
    ],
)
def test_bad_batches_leave_the_history_alone(llama, ids, batches, message):
    pp_fx.transform(llama, CONFIG)
    pp_fx.calibrate(llama, ids, progress=False)
    before = snapshot(llama)
    with pytest.raises(InputError, match=message):
        pp_fx.calibrate(llama, batches, progress=False)
    assert unchanged(llama, before)
    assert all(s.mode == "run" for s in states_of(llama))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_never_enter_the_history(llama, ids, poison):
    pp_fx.transform(llama, CONFIG)
    pp_fx.calibrate(llama, ids, progress=False)
    before = snapshot(llama)
    with torch.no_grad():
        llama.model.embed_tokens.weight[5] = poison
    bad = ids.clone()
    bad[0, 0] = 5
    with pytest.raises(InputError, match="not finite"):
        pp_fx.calibrate(llama, [ids.clamp(min=6), bad], progress=False)
    assert unchanged(llama, before)
    with torch.no_grad():
        llama(bad)  # nor by an ordinary forward
    assert unchanged(llama, before)


def test_calibrate_needs_a_transformed_model(llama, ids):
    with pytest.raises(StateError, match=r"pp_fx\.transform"):
        pp_fx.calibrate(llama, ids)


def test_lines_are_joined_as_other_tools_do(llama):
    """A list of lines, none as long as a sequence, and a column of a dataset."""
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    lines = [f"line {i} of a text that is cut into sequences" for i in range(9)]
    pp_fx.transform(llama, CONFIG)

    class Tokenizer:
        def __call__(self, text, **given):
            return type("Encoded", (), {"input_ids": torch.tensor([[2 + ord(c) % 90 for c in text]])})

    results = []
    for kind in (lines, datasets.Dataset.from_dict({"text": lines})["text"], "\n\n".join(lines)):
        pp_fx.calibrate(llama, kind, tokenizer=Tokenizer(), length=64, progress=False)
        results.append([s.mean.clone() for s in states_of(llama) if s.mean is not None])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_more_tokens_than_learned_positions():
    model = transformed(build("GPT-2"), CONFIG)
    ids = torch.zeros(1, 257, dtype=torch.long)
    with pytest.raises(InputError, match="length=257, the model has learned 256 positions"):
        pp_fx.calibrate(model, ids, progress=False)
    with pytest.raises(InputError, match="length=257, the model has learned 256 positions"):
        evaluate(model, ids, 1)
    pp_fx.calibrate(model, ids[:, :256], progress=False)
    assert learned_positions(model) == learned_positions(build("OPT")) == 256
    assert learned_positions(build("Llama")) is None
