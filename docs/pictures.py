"""Draw a layer's graph before and after `transform`: docs/pictures/before.png and after.png.

    python docs/pictures.py

From the graphs themselves: nodes in columns by their depth, colored by the pass that put them there.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import pp_fx
from pp_fx.capture.calls import record_calls
from pp_fx.capture.trace import capture_layer

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {
    "probe": "#e8590c",
    "score": "#2b8a3e",
    "gram": "#2b8a3e",
    "compensation": "#c92a2a",
    "history": "#c92a2a",
    "kept_heads": "#9c36b5",
    "inputs_kept": "#9c36b5",
    "gate_kept": "#9c36b5",
    "up_kept": "#9c36b5",
    "q_kept": "#9c36b5",
    "o_kept": "#9c36b5",
    "down_kept": "#9c36b5",
    "kept": "#2b8a3e",
}
"""Part of a node's name -> color; the first that fits. Everything else was there before."""
QUIET = {
    "view",
    "transpose",
    "reshape",
    "getitem",
    "to",
    "unsqueeze",
    "slice",
    "getattr",
    "sym_size",
    "plan",
    "real_rows",
}


def shown(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that compute something."""
    calls = (n for n in graph.nodes if n.op == "call_function")
    return [n for n in calls if not any(n.name.rstrip("_0123456789").startswith(q) for q in QUIET)]


def draw(graph: fx.Graph, file: Path, title: str) -> None:
    """One picture: depth from left to right."""
    nodes = shown(graph)
    depth: dict[fx.Node, int] = {}
    edges = []

    def sources(node: fx.Node) -> set[fx.Node]:
        found = set()
        for source in node.all_input_nodes:
            found |= {source} if source in depth else sources(source) if source.op == "call_function" else set()
        return found

    for node in nodes:
        before = sources(node)
        depth[node] = 1 + max((depth[s] for s in before), default=-1)
        edges += [(s, node) for s in before]
    columns: dict[int, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        columns[depth[node]].append(node)
    place = {n: (d, i - (len(c) - 1) / 2) for d, c in columns.items() for i, n in enumerate(c)}
    height = max(len(c) for c in columns.values())
    figure, axes = pyplot.subplots(figsize=(0.62 * len(columns) + 1, 0.62 * height + 1), layout="constrained")
    for source, node in edges:
        (x, y), (u, v) = place[source], place[node]
        axes.annotate("", (u - 0.3, v), (x + 0.3, y), arrowprops={"arrowstyle": "-", "color": "#b8c4d0", "lw": 0.8})
    for node, (x, y) in place.items():
        color = next((c for part, c in COLORS.items() if part in node.name), "#1f6feb")
        axes.scatter(x, y, s=90, color=color, zorder=3)
        axes.annotate(node.name, (x, y), xytext=(0, 8), textcoords="offset points", size=6, ha="center", rotation=18)
    axes.set_title(title, loc="left")
    axes.axis("off")
    axes.margins(0.05)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model: Any = LlamaForCausalLM(config).eval()
    layers = model.model.layers
    calls = record_calls(model, layers, 3, 7)[0], record_calls(model, layers, 5, 11)[0]
    folder = Path(__file__).parent / "pictures"
    folder.mkdir(exist_ok=True)
    draw(capture_layer(model, layers[0], calls), folder / "before.png", "LlamaDecoderLayer, captured")
    pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=0))
    draw(layers[0].graph, folder / "after.png", "The same layer, its MLP probe-pruned")


if __name__ == "__main__":
    main()
