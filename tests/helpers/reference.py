"""Probe Pruning on a Llama stack, written from the paper's equations (arXiv 2502.15618) in plain eager PyTorch.

It shares no code with pp_fx: weights are read from a Hugging Face Llama, everything else is loops and formulas. fp32,
one sample at a time where that is clearer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Settings:
    mlp_kept: list[int]
    heads_kept: list[int]
    token_fraction: float
    sample_fraction: float
    min_positions: int
    first: str
    history: str | None
    history_length: int = 512
    epsilon: float = 0.0
    momentum: float = 0.99
    mix: float = 0.5
    compensation_mlp: str | None = "mean"
    compensation_attention: str | None = None
    history_rows: int = 256
    compensation_rows: int = 256
    ridge: float = 0.1
    min_tokens: int = 512
    joint_heads: bool = True
    queries: bool = True
    ranking: str = "residual"


@dataclass
class Result:
    logits: torch.Tensor
    kept: dict = field(default_factory=dict)
    bias: dict = field(default_factory=dict)
    gap: float = math.inf


class Reference:
    def __init__(self, model, settings: Settings) -> None:
        self.m, self.s, self.c = model, settings, model.config
        self.head_dim = getattr(self.c, "head_dim", None) or self.c.hidden_size // self.c.num_attention_heads
        self.energy: dict = {}
        self.mean: dict = {}
        self.gram: dict = {}
        self.correction: dict = {}

    # ------------------------------------------------------------------ Llama
    def norm(self, x, weight):
        return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.c.rms_norm_eps))

    def rotate(self, x, positions):
        """x [n, heads, D] at integer positions [n]."""
        half = self.head_dim // 2
        theta = self.c.rope_parameters["rope_theta"]
        angle = positions[:, None].float() * theta ** (-torch.arange(half).float() * 2 / self.head_dim)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def heads(self, layer, x, positions, real):
        """Head outputs [n, heads * D] of one sample's rows x [n, H] at `positions`; padded keys are not seen."""
        at, n = layer.self_attn, len(x)
        q, k, v = (lin(x).view(n, -1, self.head_dim) for lin in (at.q_proj, at.k_proj, at.v_proj))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        logits = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(self.head_dim)
        seen = (positions[:, None] >= positions[None, :]) & real[None, :]
        seen |= torch.eye(n, dtype=torch.bool)
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weights, v).reshape(n, -1)

    def mlp(self, layer, x):
        gate = layer.mlp.gate_proj(x)
        return gate * torch.sigmoid(gate) * layer.mlp.up_proj(x)

    # ------------------------------------------------------------------ the method
    def rank(self, residual, real, readers):
        """Probe positions (from each sample's first real token) and samples: the rows with the largest norm.

        Ranked by "outlier", every feature counts as much as the weights `readers` [out, H] make of it.
        """
        batch, length, _ = residual.shape
        if self.s.ranking == "even":
            return self.spread(real, length)
        if self.s.ranking == "outlier":
            residual = residual * sum((w**2).sum(0) for w in readers).sqrt()
        norms = torch.zeros(batch, length)
        for b in range(batch):
            for t in range(self.begin[b], length):
                norms[b, t - self.begin[b]] = residual[b, t].norm() * real[b, t]
        count = min(length, max(self.s.min_positions, math.ceil(round(self.s.token_fraction * length, 9))))
        by_position = (norms**2).sum(0).sqrt()
        order = sorted(range(length), key=lambda t: -by_position[t].item())
        self.note_gap(by_position[order], count)
        picked = order[:count]
        if 0 not in picked and (self.s.first == "always" or (self.s.first == "few" and count <= 10)):
            self.note_gap(by_position[order], count - 1)  # the lowest pick gives way: which one is it
            picked[-1] = 0
        picked = sorted(picked)
        samples = min(batch, max(1, math.ceil(round(self.s.sample_fraction * batch, 9))))
        by_sample = (norms[:, picked] ** 2).sum(1).sqrt()
        order = sorted(range(batch), key=lambda b: -by_sample[b].item())
        self.note_gap(by_sample[order], samples)
        return torch.tensor(picked), torch.tensor(sorted(order[:samples]))

    def spread(self, real, length):
        """Probe positions and samples in the middles of equal parts; positions of the longest sample."""
        batch, longest = len(real), max(int(real[b, self.begin[b] :].sum()) for b in range(len(real)))
        count = min(length, max(self.s.min_positions, math.ceil(round(self.s.token_fraction * length, 9))))
        picked = [math.floor((i + 0.5) * longest / count) for i in range(count)]
        if self.s.first == "always" or (self.s.first == "few" and count <= 10):
            picked[0] = 0
        samples = min(batch, max(1, math.ceil(round(self.s.sample_fraction * batch, 9))))
        return torch.tensor(picked), torch.tensor([math.floor((i + 0.5) * batch / samples) for i in range(samples)])

    def note_gap(self, ordered, count):
        if 0 < count < len(ordered):
            best, next_best = ordered[count - 1].item(), ordered[count].item()
            self.gap = min(self.gap, (best - next_best) / max(best, 1e-30))

    def choose(self, key, z, real, positions, weight, kept, width):
        """z [B', T', C] probe state -> kept units, most important `kept`, ascending."""
        c = torch.zeros(z.shape[-1])
        for t in range(z.shape[1]):
            rows = z[:, t][real[:, t]]
            if len(rows) == 0:
                continue
            p = (rows**2).mean(0)
            if key in self.energy:
                g = self.energy[key]
                g = g[min(int(positions[t]), self.s.history_length - 1)] if g.ndim == 2 else g
                total = p + g + self.s.epsilon
                p = torch.where(total > 0, (p * p + g * g) / total.clamp(min=1e-38), 0)
            c += p
        column = ((weight**2) * c[None, :]).view(weight.shape[0], -1, width)
        score = (column**2).sum((0, 2)).sqrt()
        order = score.argsort(descending=True)
        self.note_gap(score[order], kept)
        return order[:kept].sort().values

    def choose_heads(self, key, z, real, residual, weight, kept):
        """z [B', T', C], residual [B', T', H] -> kept heads: those left by dropping what the output misses least."""
        count = z.shape[0] * z.shape[1]
        taken = min(count, self.s.compensation_rows)
        picked = [i * count // taken for i in range(taken)]
        valid = real.flatten()[picked]
        z, residual = z.flatten(0, 1)[picked][valid], residual.flatten(0, 1)[picked][valid]
        heads = weight.shape[1] // self.head_dim
        gram = torch.zeros(heads, heads)
        if len(z):
            parts = (z - z.mean(0)).view(len(z), heads, self.head_dim)
            out = torch.einsum("nhd,ohd->nho", parts, weight.view(-1, heads, self.head_dim))
            gram = torch.einsum("n,ngo,nho->gh", 1 / (residual**2).mean(-1), out, out) / len(z)
        mixed = self.s.mix * self.gram[key] + (1 - self.s.mix) * gram if key in self.gram else gram
        self.probe_gram = gram if len(z) or key in self.gram else None
        dropped: list[int] = []
        while len(dropped) < heads - kept:
            left = [h for h in range(heads) if h not in dropped]
            cost = torch.stack([mixed[[*dropped, h]][:, [*dropped, h]].sum() for h in left])
            order = cost.argsort()
            if len(left) > 1:
                best, second = cost[order[0]].item(), cost[order[1]].item()
                self.gap = min(self.gap, (second - best) / max(mixed.abs().max().item(), 1e-30))
            dropped.append(left[order[0]])
        return torch.tensor([h for h in range(heads) if h not in dropped])

    def branch(self, index, kind, layer, residual, real, linear, units, kept, width, compensation):
        positions_all = torch.arange(residual.shape[1])
        before = layer.input_layernorm.weight if kind == "attention" else layer.post_attention_layernorm.weight

        def state(rows, positions, mask):
            x = self.norm(rows, before)
            return self.heads(layer, x, positions, mask) if kind == "attention" else self.mlp(layer, x)

        full = torch.stack([state(residual[b], positions_all, real[b]) for b in range(len(residual))])
        if kept >= units:
            return linear(full)
        key = (index, kind)
        if self.prompt is not None:
            return self.decode(key, full, linear, width)
        readers = [layer.self_attn.q_proj] if kind == "attention" else [layer.mlp.gate_proj, layer.mlp.up_proj]
        positions, samples = self.rank(residual, real, [linear.weight for linear in readers])
        columns = [(positions + self.begin[b]).clamp(max=residual.shape[1] - 1) for b in samples]
        inside = torch.stack([positions + self.begin[b] < residual.shape[1] for b in samples])
        probed = torch.stack([residual[b][c] for b, c in zip(samples, columns, strict=True)])
        valid = torch.stack([real[b][c] for b, c in zip(samples, columns, strict=True)]) & inside
        if kind == "attention" and self.s.queries:
            z = torch.stack([full[b][c] for b, c in zip(samples, columns, strict=True)])
        else:
            z = torch.stack([state(r, c, v) for r, c, v in zip(probed, columns, valid, strict=True)])
        if kind == "attention" and self.s.joint_heads:
            chosen = self.choose_heads(key, z, valid, probed, linear.weight, kept)
        else:
            chosen = self.choose(key, z, valid, positions, linear.weight, kept, width)
        self.kept[key] = chosen
        columns = (chosen[:, None] * width + torch.arange(width)).flatten()
        dropped = torch.ones(units * width, dtype=torch.bool)
        dropped[columns] = False
        out = full[..., columns] @ linear.weight[:, columns].T
        if linear.bias is not None:
            out = out + linear.bias
        probe_mean = z[valid].mean(0) if valid.any() else torch.zeros(units * width)
        self.correction.pop(key, None)
        if compensation == "least_squares" and residual.shape[0] * residual.shape[1] >= self.s.min_tokens:
            self.least_squares(key, z, valid, linear.weight, columns, dropped)
            out = out + full[..., columns] @ self.correction[key] + self.bias[key]
        elif compensation is not None:
            mu = probe_mean
            if key in self.mean:
                mu = self.s.mix * self.mean[key] + (1 - self.s.mix) * probe_mean
            self.bias[key] = linear.weight[:, dropped] @ mu[dropped]
            out = out + self.bias[key]
        self.update(key, full, real, columns, z, valid, probe_mean)
        return out

    def least_squares(self, key, z, valid, weight, kept, dropped):
        """Ridge regression of the dropped channels on the kept ones, with the whole [C, C] covariance."""
        count = z.shape[0] * z.shape[1]
        taken = min(count, self.s.compensation_rows)
        picked = [i * count // taken for i in range(taken)]
        rows, real = z.flatten(0, 1)[picked], valid.flatten()[picked]
        rows = rows[real]
        share = self.s.mix if key in self.mean else 0.0
        probe_mean = rows.mean(0) if len(rows) else torch.zeros(z.shape[-1])
        mu = (1 - share) * probe_mean + (share * self.mean[key] if share else 0)
        cov, own = torch.zeros(z.shape[-1], z.shape[-1]), torch.zeros(z.shape[-1])
        if len(rows):
            about = (rows - mu).T @ (rows - mu) / len(rows) * (1 - share)
            own += about.diagonal() / 2
            cov += (about + torch.diag(about.diagonal())) / 2
        if share:
            energy = self.energy[key].mean(0) if self.energy[key].ndim == 2 else self.energy[key]
            variance = (energy - self.mean[key] ** 2).clamp(min=0) * share
            shift = self.mean[key] - mu
            cov += torch.diag(variance) + share * torch.outer(shift, shift)
            own += variance
        if own[kept].mean() <= 1e-5 * cov.diagonal()[kept].mean():
            self.gap = 0.0  # nothing but rounding on the diagonal: the solution is noise
        ridge = (self.s.ridge * own[kept].mean() + 1e-30) * torch.eye(len(kept))
        target = cov[kept][:, dropped] @ weight[:, dropped].T
        x = torch.linalg.solve((cov[kept][:, kept] + ridge).double(), target.double()).float()
        self.correction[key] = x
        self.bias[key] = weight[:, dropped] @ mu[dropped] - mu[kept] @ x

    def decode(self, key, full, linear, width):
        """The output with the prompt's selection and bias; positions from `dense_from` on whole."""
        chosen = self.prompt.kept[key]
        columns = (chosen[:, None] * width + torch.arange(width)).flatten()
        out = full[..., columns] @ linear.weight[:, columns].T + self.prompt.bias.get(key, 0)
        if key in self.correction:
            out = out + full[..., columns] @ self.correction[key]
        if linear.bias is not None:
            out = out + linear.bias
        if self.dense_from is not None:
            out[:, self.dense_from :] = linear(full)[:, self.dense_from :]
        return out

    def update(self, key, full, real, columns, z, valid, probe_mean):
        if self.s.history != "channel":
            return
        flat, mask = full.flatten(0, 1), real.flatten()
        step = math.ceil(len(flat) / self.s.history_rows)
        rows = flat[::step][mask[::step]]
        if len(rows) == 0:
            return
        if key[1] == "attention" and self.s.joint_heads and self.probe_gram is not None:
            m, gram = self.s.momentum, self.probe_gram
            self.gram[key] = m * self.gram[key] + (1 - m) * gram if key in self.gram else gram
        energy, mean = (rows**2).mean(0)[columns], rows.mean(0)[columns]
        if key not in self.energy:
            self.energy[key], self.mean[key] = (z[valid] ** 2).mean(0), probe_mean.clone()
            self.energy[key][columns], self.mean[key][columns] = energy, mean
            return
        m = self.s.momentum
        self.energy[key][columns] = m * self.energy[key][columns] + (1 - m) * energy
        self.mean[key][columns] = m * self.mean[key][columns] + (1 - m) * mean

    @torch.no_grad()
    def forward(self, ids, mask=None, prompt: Result | None = None, dense_from: int | None = None) -> Result:
        """ids [B, T], mask [B, T] of 0 and 1 -> logits and kept units of every pruned branch.

        With `prompt`, the result of a shorter forward over the first tokens, its selection holds for all positions
        (decoding without a KV cache); positions from `dense_from` on run whole.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.kept, self.bias, self.gap, self.prompt, self.dense_from = {}, {}, math.inf, prompt, dense_from
        self.begin = [row.tolist().index(True) if row.any() else 0 for row in real]
        x = self.m.model.embed_tokens.weight[ids]
        for i, layer in enumerate(self.m.model.layers):
            heads, channels = self.c.num_attention_heads, self.c.intermediate_size
            x = x + self.branch(
                i, "attention", layer, x, real, layer.self_attn.o_proj, heads, self.s.heads_kept[i],
                self.head_dim, self.s.compensation_attention,
            )  # fmt: skip
            x = x + self.branch(
                i, "mlp", layer, x, real, layer.mlp.down_proj, channels, self.s.mlp_kept[i], 1, self.s.compensation_mlp
            )
        return Result(self.m.lm_head(self.norm(x, self.m.model.norm.weight)), self.kept, self.bias, self.gap)
