"""`model_stateful.onnx`: a host that feeds declared inputs alone gets the same tokens, pruned."""

import numpy as np
import onnxruntime
import pytest
import torch

from pp_fx.export import OrtModel


@pytest.fixture(scope="module")
def folder(exported):
    return exported[1]


@pytest.fixture(scope="module")
def session(folder):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / "model_stateful.onnx", options)


def empty(session, batch):
    """No past and no selection."""
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    return {
        i.name: np.zeros([d if isinstance(d, int) else batch * (d == "batch_size") for d in i.shape], types[i.type])
        for i in session.get_inputs()
        if i.name.startswith(("past_key_values.", "pp_compact."))
    }


def step(session, ids, state):
    """Logits of the last token and the next state; a call that did not select leaves the selection as it was."""
    past = state["past_key_values.0.key"].shape[2]
    batch, length = ids.shape
    given = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, past + length), np.int64),
        "position_ids": np.arange(past, past + length)[None].repeat(batch, 0),
        "num_logits_to_keep": np.array(1),
    }
    names = [o.name for o in session.get_outputs()]
    out = dict(zip(names, session.run(names, {**given, **state}), strict=True))
    found = {n: out[n.replace("past_key_values", "present").replace("pp_compact", "present_compact")] for n in state}
    kept = {n: v if n.startswith("past") or found["pp_compact.1.mlp.kept"].size else state[n] for n, v in found.items()}
    return out["logits"][:, -1:].argmax(-1), kept


@pytest.mark.parametrize(("batch", "length"), [(1, 40), (2, 33), (1, 3)])
def test_gives_the_tokens_of_ort_model(folder, session, batch, length):
    """The short prompt is below `min_select_tokens`: it selects because it has no selection."""
    ids = torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(length))
    ours = OrtModel.from_pretrained(folder, ops_library=None).generate(ids, max_new_tokens=8, do_sample=False)
    token, state = ids.numpy(), empty(session, batch)
    made = []
    for _ in range(8):
        token, state = step(session, token, state)
        made.append(token)
    assert np.array_equal(np.concatenate(made, 1), ours[:, length:].numpy())
    assert state["pp_compact.1.mlp.gate"].shape[0] < 96


def test_every_call_has_to_bring_its_selection(session):
    state = empty(session, 1)
    del state["pp_compact.1.mlp.gate"]
    with pytest.raises(ValueError, match=r"pp_compact\.1\.mlp\.gate"):
        step(session, np.ones((1, 4), np.int64), state)
