"""An oracle for any family: the original model, dropped channels zeroed by hooks and the compensation added."""

import copy
import warnings

import torch
from transformers import DynamicCache

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.rewrite.layer import layers_of

PRUNED = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4,
    attention_ratio=0.4,
    skip_layers=1,
    round_to=1,
    compensation_min_tokens=64,
    decode="sticky",
)


def transformed(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what stays dense has tests of its own
        return pp_fx.transform(model, config)


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return mask


def assert_equals_zeroed(original, ids, padded, model=None, tolerance=1e-4):
    """Prefill and decoding of the pruned model against the zeroed original; layers 1 and 2 of 3 must prune.

    `model`: the original, transformed with PRUNED; made here where it is not given. `tolerance`: of the largest logit.
    """
    model = transformed(copy.deepcopy(original), PRUNED) if model is None else model
    inputs = {"attention_mask": left_padded(ids)} if padded else {}
    cache = DynamicCache(config=model.config)
    following = ids.flip(1)[:, :4]
    with torch.no_grad(), pp_fx.history_frozen(model):
        # compact weights take the corrections in: those of a forward that makes its cache itself are still apart
        chosen = selections_on(model(ids, use_cache=True, **inputs).past_key_values).layers
        got = [model(ids, past_key_values=cache, **inputs).logits]
        if padded:
            inputs = {"attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(following)], 1)}
        got.append(model(following, past_key_values=cache, **inputs).logits)
    assert sorted(chosen) == [1, 2]  # the first layer is skipped
    zero_channels(original, layers_of(model), chosen)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = {"attention_mask": left_padded(ids)} if padded else {}
        expected = [original(ids, past_key_values=cache, **first).logits]
        expected.append(original(following, past_key_values=cache, **inputs).logits)
    real = left_padded(ids).bool() if padded else torch.ones_like(ids).bool()
    scale = expected[0][real].abs().max().clamp(min=1)
    torch.testing.assert_close(got[0][real] / scale, expected[0][real] / scale, atol=tolerance, rtol=0)
    torch.testing.assert_close(got[1] / scale, expected[1] / scale, atol=tolerance, rtol=0)


def output_projection(original, rewritten, index, kind):
    """The original's module that a rewritten layer's output projection was."""
    twins = [m for m in original.modules() if type(m).__name__ == rewritten[0].original_class.__name__]
    assert len(twins) == len(rewritten)
    return twins[index].get_submodule(rewritten[index].groups[kind].output.module)


def zero_channels(original, rewritten, chosen):
    """Hooks on the original's output projections."""
    for index, groups in chosen.items():
        for kind, selection in groups.items():
            output = rewritten[index].groups[kind].output
            mask = torch.zeros(output.in_features)
            mask[selection.columns] = 1
            projection = output_projection(original, rewritten, index, kind)
            projection.register_forward_pre_hook(
                lambda m, args, mask=mask: (args[0] * mask.to(args[0].dtype), *args[1:])
            )
            made, columns = selection.compensation, selection.columns
            projection.register_forward_hook(
                lambda m, args, out, made=made, columns=columns: _compensated(out, args[0], made, columns)
            )


def _compensated(out, z, made, columns):
    corrected = 0 if made.correction is None else z[..., columns] @ made.dense_correction().to(z.dtype)
    return out + corrected + made.vector.to(z.dtype)
