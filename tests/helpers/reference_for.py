"""The reference algorithm with the settings of a configuration."""

import copy

from .reference import Reference, Settings


def kept_counts(config, model):
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    channels = model.config.intermediate_size
    scale = layers / (layers - config.skip_layers)
    dropped = int(config.mlp_ratio * scale * channels)
    mlp = channels - dropped
    if dropped:
        mlp = min(channels, (mlp + config.round_to - 1) // config.round_to * config.round_to)
    attention = heads - int(config.attention_ratio * scale * heads)
    skip = config.skip_layers
    return [channels] * skip + [mlp] * (layers - skip), [heads] * skip + [attention] * (layers - skip)


def reference_for(model, config):
    config = config.on("cpu")
    mlp, heads = kept_counts(config, model)
    p = config.probe
    return Reference(
        copy.deepcopy(model),
        Settings(
            mlp, heads, p.token_fraction, p.sample_fraction, p.min_positions, p.first_position, config.history,
            config.history_length, config.fusion_epsilon, config.momentum, config.compensation_mix,
            config.mlp_compensation, config.attention_compensation, config.history_rows,
            config.compensation_rows, config.compensation_ridge, config.compensation_min_tokens,
            config.attention_score == "joint", p.attention == "queries", p.ranking,
        ),
    )  # fmt: skip
