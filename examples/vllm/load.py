"""Load on a server (`pp-fx serve`): requests at once, their latencies and the tokens a second.

python examples/vllm/load.py [requests] [tokens of an answer] [url]
"""

import concurrent.futures
import json
import statistics
import sys
import time
import urllib.request

PROMPT = "Probe pruning looks ahead with a tiny probe and decides which channels this prompt needs. "


def ask(url: str, number: int, tokens: int) -> tuple[float, int]:
    """Seconds of one completion, and its tokens with the prompt's."""
    body = {"model": "pruned", "prompt": f"{number}. {PROMPT * 20}", "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        total = json.load(answer)["usage"]["total_tokens"]
    return time.perf_counter() - start, total


def main(requests: str = "32", tokens: str = "64", url: str = "http://localhost:8000") -> None:
    count, start = int(requests), time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda number: ask(url, number, int(tokens)), range(count)))
    seconds, total = [s for s, _ in found], sum(t for _, t in found)
    print(
        f"{count} requests: {total / (time.perf_counter() - start):.0f} tokens/s, latency median "
        f"{statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
