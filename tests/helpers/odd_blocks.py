"""Decoder blocks that no library has: legal shapes under odd names, and blocks that must not be pruned."""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HIDDEN, HEADS, KV_HEADS, WIDTH, CHANNELS, VOCABULARY = 64, 4, 2, 16, 96, 97
F = nn.functional


class OddConfig(PreTrainedConfig):
    """Sizes of every odd model."""

    model_type = "pp_fx_odd"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = VOCABULARY, HIDDEN, 3
        self.num_attention_heads, self.num_key_value_heads = HEADS, KV_HEADS


class Mixer(nn.Module):
    """Grouped-query attention without rotation, under names that say nothing."""

    is_causal = True

    def __init__(self, config, index):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, index, WIDTH
        self.num_key_value_groups = HEADS // KV_HEADS
        self.one = nn.Linear(HIDDEN, HEADS * WIDTH)
        self.two = nn.Linear(HIDDEN, KV_HEADS * WIDTH)
        self.three = nn.Linear(HIDDEN, KV_HEADS * WIDTH)
        self.four = nn.Linear(HEADS * WIDTH, HIDDEN)

    def heads(self, x):
        return [f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.one, self.two, self.three)]

    def forward(self, x, mask, cache):
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        core = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sdpa_attention_forward)
        return self.four(core(self, q, k, v, mask, scaling=WIDTH**-0.5)[0].flatten(2))


class GroupedMixer(Mixer):
    """One weight, with the query heads of each key/value head beside it."""

    def __init__(self, config, index):
        super().__init__(config, index)
        del self.one, self.two, self.three
        self.all = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * WIDTH)

    def heads(self, x):
        groups = self.all(x).unflatten(-1, (KV_HEADS, HEADS // KV_HEADS + 2, WIDTH))
        q, k, v = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
        return [t.transpose(1, 2) for t in (q, k, v)]


class Block(GradientCheckpointingLayer):
    """Two branches; subclasses say what the second one does."""

    mixer = Mixer

    def __init__(self, config, index):
        super().__init__()
        self.left, self.right = nn.LayerNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.mix = self.mixer(config, index)
        self.build()

    def build(self):
        self.p, self.q, self.r = nn.Linear(HIDDEN, CHANNELS), nn.Linear(HIDDEN, CHANNELS), nn.Linear(CHANNELS, HIDDEN)

    def inner(self, x):
        return self.r(self.p(x) * F.silu(self.q(x)))

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        hidden_states = hidden_states + self.mix(self.left(hidden_states), attention_mask, past_key_values)
        return hidden_states + self.inner(self.right(hidden_states))


class SwappedBlock(Block):
    """The linear projection comes before the gate."""


class GroupedBlock(Block):
    mixer = GroupedMixer


class SandwichBlock(Block):
    """Norms behind the branches, scaled residuals, and both branches read the same input."""

    def build(self):
        super().build()
        self.after = nn.LayerNorm(HIDDEN)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        mixed = self.after(self.mix(self.left(hidden_states), attention_mask, past_key_values))
        return hidden_states * 0.7 + 0.3 * mixed + self.after(self.inner(self.right(hidden_states)))


class ThreeProjectionsBlock(Block):
    def build(self):
        super().build()
        self.s = nn.Linear(HIDDEN, CHANNELS, bias=False)

    def inner(self, x):
        return self.r(self.p(x) * torch.sigmoid(self.q(x)) + self.s(x).relu())


class ChannelVectorsBlock(Block):
    """A scale and a shift for every channel between the projections."""

    def build(self):
        super().build()
        self.scale, self.shift = nn.Parameter(torch.ones(CHANNELS)), nn.Parameter(torch.zeros(CHANNELS))

    def inner(self, x):
        return self.r((self.p(x) * self.scale + self.shift).relu().square())


class InterleavedBlock(Block):
    """Gate and up in one weight, row about row."""

    def build(self):
        self.both, self.r = nn.Linear(HIDDEN, 2 * CHANNELS), nn.Linear(CHANNELS, HIDDEN)

    def inner(self, x):
        gate, up = self.both(x).unflatten(-1, (CHANNELS, 2)).unbind(-1)
        return self.r(F.gelu(gate) * up)


class ReturnedBlock(Block):
    """The channels are also a result of the layer."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        hidden_states = hidden_states + self.mix(self.left(hidden_states), attention_mask, past_key_values)
        x = self.right(hidden_states)
        channels = self.p(x) * F.silu(self.q(x))
        return hidden_states + self.r(channels), channels


class UsedTwiceBlock(Block):
    def build(self):
        super().build()
        self.s = nn.Linear(CHANNELS, HIDDEN)

    def inner(self, x):
        channels = self.p(x).relu()
        return self.r(channels) * torch.sigmoid(self.s(channels))


class NormedBlock(Block):
    """A norm over the channels between the projections."""

    def build(self):
        super().build()
        self.norm = nn.RMSNorm(CHANNELS)

    def inner(self, x):
        return self.r(self.norm(self.p(x) * F.silu(self.q(x))))


class RolledBlock(Block):
    def inner(self, x):
        return self.r(self.p(x) * F.silu(self.q(x)).roll(1, -1))


class ReusedGateBlock(Block):
    """The gate is also added to the branch's output, cut to its width."""

    def inner(self, x):
        gate = self.q(x)
        return self.r(self.p(x) * F.silu(gate)) + gate[..., :HIDDEN]


class LeakyFusedBlock(InterleavedBlock):
    """The fused projection's whole output is used beside its parts."""

    def inner(self, x):
        both = self.both(x)
        gate, up = both.unflatten(-1, (CHANNELS, 2)).unbind(-1)
        return self.r(F.gelu(gate) * up) + both.mean(-1, keepdim=True)


class FirstTokenGateBlock(Block):
    """A fused projection whose gate is the first token's, for all tokens."""

    def build(self):
        self.both, self.r = nn.Linear(HIDDEN, 2 * CHANNELS), nn.Linear(CHANNELS, HIDDEN)

    def inner(self, x):
        both = self.both(x)
        return self.r(both[:, :1, :CHANNELS].sigmoid() * both[..., CHANNELS:])


class QueryGateMixer(Mixer):
    """The query also gates the output."""

    def heads(self, x):
        q, k, v = super().heads(x)
        self.gate = torch.sigmoid(q.mean((1, 3)))[..., None]
        return [q, k, v]

    def forward(self, x, mask, cache):
        return super().forward(x, mask, cache) * self.gate


class QueryGateBlock(Block):
    mixer = QueryGateMixer


class ClippedQueryMixer(Mixer):
    """All heads of a long query are shortened together."""

    def heads(self, x):
        q, k, v = super().heads(x)
        return [q * (8 / q.norm(dim=(1, 3), keepdim=True)).clamp(max=1), k, v]


class ClippedQueryBlock(Block):
    mixer = ClippedQueryMixer


class FixedHeadsMixer(Mixer):
    """The number of heads is written out behind the core."""

    def forward(self, x, mask, cache):
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        core = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sdpa_attention_forward)
        out = core(self, q, k, v, mask, scaling=WIDTH**-0.5)[0]
        return self.four(out.reshape(*x.shape[:2], HEADS * WIDTH))


class FixedHeadsBlock(Block):
    mixer = FixedHeadsMixer


class InPlaceViewBlock(Block):
    """Some channels are changed in place, through a view."""

    def inner(self, x):
        channels = self.p(x).relu()
        channels[..., :8].mul_(3)
        return self.r(channels)


class OwnIndexBlock(Block):
    """The layer computes with its own index."""

    def inner(self, x):
        return self.r(self.p(x).relu()) * (1 + self.mix.layer_idx)


class OddModel(PreTrainedModel, GenerationMixin):
    """A causal language model over three blocks of one class."""

    config_class = OddConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config, block):
        super().__init__(config)
        self.words = nn.Embedding(VOCABULARY, HIDDEN)
        self.stack = nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=True, **kwargs):
        hidden = self.words(input_ids)
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=past_key_values
        )
        for layer in self.stack:
            hidden = layer(hidden, attention_mask=mask, past_key_values=past_key_values)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return CausalLMOutputWithPast(logits=self.head(hidden), past_key_values=past_key_values)


PRUNABLE = [SwappedBlock, GroupedBlock, SandwichBlock, ThreeProjectionsBlock, ChannelVectorsBlock, InterleavedBlock]
DENSE = {
    ReturnedBlock: "is also used by output",
    UsedTwiceBlock: "is also used by linear",
    NormedBlock: "not pointwise",
    RolledBlock: "not pointwise",
    ReusedGateBlock: "is also used by slice",
    LeakyFusedBlock: "is also used by mean",
    InPlaceViewBlock: "not pointwise",
    FirstTokenGateBlock: "differ in their number of channels",
}
"""Block -> part of the reason why its MLP is left dense."""


REFUSED = [OwnIndexBlock]
"""Blocks that a graph cannot hold."""


def odd_model(block):
    """A random model, with weights large enough that errors show up."""
    torch.manual_seed(0)
    model = OddModel(OddConfig(attn_implementation="sdpa", pad_token_id=0, bos_token_id=1), block).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5))
    model.generation_config.eos_token_id = None
    return model
