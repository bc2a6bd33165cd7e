"""Requests per second and latency of `amortlm serve` against `transformers.generate`, one request after the other, on
the same model and prompt, at 1, 8 and 32 clients.

python -m benchmarks.serving

The model is the policy of an untrained posterior on the embedded model (LoRA included, on both sides). A request is
for one completion of at most 20 tokens that ends at "."; the baseline generates with the same stop and length, behind a
lock, because a model serves one caller at a time. Both run in one process and in turn, so only the ratios mean
something. `together`: the largest number of requests that one pass served.
"""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import uvicorn
from tabulate import tabulate

from amortlm import LanguageModel, Policy, Posterior, Support
from amortlm.serve import create_app

PROMPT = "Ella went to the toy store with her cousin. She let go of her cousin's hand to look at a doll."
TOKENS = 20
REQUESTS = {1: 32, 8: 64, 32: 128}  # by number of clients; in two halves
Ask = Callable[[int], None]  # a request with this seed


class Run(NamedTuple):
    """Seconds: of each request, and of all."""

    latencies: list[float]
    wall: float

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.wall

    def quantile(self, share: float) -> float:
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[round(share * 100) - 1]


def measure(make: Callable[[], Ask], clients: int, seeds: Iterator[int]) -> Run:
    """Half of the requests, from that many threads; each has an asker of its own."""
    each = REQUESTS[clients] // 2 // clients

    def client(_: int) -> list[float]:
        ask, found = make(), []
        for _ in range(each):
            start = time.perf_counter()
            ask(next(seeds))
            found.append(time.perf_counter() - start)
        return found

    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        latencies = [x for part in pool.map(client, range(clients)) for x in part]
        return Run(latencies, time.perf_counter() - start)


def generate(policy: Policy) -> Callable[[], Ask]:
    """`transformers.generate` on the policy's model, one call at a time."""
    ids = torch.tensor(policy.encode_rows([{"x": PROMPT}]))
    settings = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": TOKENS,
        "eos_token_id": policy.support.stop_ids[0],
        "pad_token_id": policy.support.stop_ids[0],
    }
    lock = threading.Lock()

    def ask(seed: int) -> None:
        with lock, torch.no_grad():
            torch.manual_seed(seed)
            out = policy.model.generate(input_ids=ids, **settings)
            policy.lm.decode(out[0, ids.shape[1] :].tolist())

    return lambda: ask


def http_client(port: int) -> Callable[[], Ask]:
    """Requests to the server, on one connection for each client."""

    def make() -> Ask:
        connection = http.client.HTTPConnection("127.0.0.1", port)

        def ask(seed: int) -> None:
            body = json.dumps({"prompt": PROMPT, "seed": seed})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise RuntimeError(answer.decode())

        return ask

    return make


@contextmanager
def server(posterior: Posterior) -> Iterator[int]:
    """The port of a server in a thread."""
    taken = socket.create_server(("127.0.0.1", 0), backlog=2048)
    running = uvicorn.Server(uvicorn.Config(create_app(posterior), log_level="error"))
    thread = threading.Thread(target=running.run, args=([taken],), daemon=True)
    thread.start()
    yield taken.getsockname()[1]
    running.should_exit = True
    thread.join()


def joined(runs: list[Run]) -> Run:
    return Run([x for run in runs for x in run.latencies], sum(run.wall for run in runs))


def main() -> None:
    torch.set_num_threads(1)
    lm = LanguageModel.from_pretrained("embedded", device="cpu")
    policy = Policy(lm, "{x}", Support(stop=".", max_tokens=TOKENS))
    posterior, together = Posterior(policy, None), list[int]()
    real = posterior.sample_each

    def counted(asks: Any, **settings: Any) -> Any:
        together.append(len(asks))
        return real(asks, **settings)

    posterior.sample_each = counted  # type: ignore[method-assign]
    seeds, table = itertools.count(), []
    with server(posterior) as port:
        ways = {"serve": http_client(port), "generate": generate(policy)}
        for make in ways.values():
            make()(next(seeds))  # what is done once
        for clients in REQUESTS:
            together.clear()
            runs: dict[str, list[Run]] = {name: [] for name in ways}
            for name in ("serve", "generate", "generate", "serve"):
                runs[name].append(measure(ways[name], clients, seeds))
            ours, theirs = joined(runs["serve"]), joined(runs["generate"])
            table.append(line(clients, ours, theirs, max(together)))
    heads = ["clients", "requests/s", "", "ratio", "p50 ms", "", "ratio", "p95 ms", "", "ratio", "together"]
    print("In pairs: serve, generate. Ratio: serve / generate.\n")
    print(tabulate(table, heads, tablefmt="github", floatfmt=".2f", intfmt=""))


def line(clients: int, ours: Run, theirs: Run, together: int) -> list[Any]:
    out: list[Any] = [clients, ours.rate, theirs.rate, ours.rate / theirs.rate]
    for share in (0.5, 0.95):
        a, b = ours.quantile(share), theirs.quantile(share)
        out += [a * 1000, b * 1000, a / b]
    return [*out, together]


if __name__ == "__main__":
    main()
