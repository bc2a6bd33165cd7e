"""Completions per second of a server with adapters, and of one with merged weights.

python -m benchmarks.merged MODEL --python .venv-vllm/bin/python [--completions 64] [--tokens 24] [--rounds 5]

Both servers run here, in float32, and are asked in turn for the same completions of the same policy (LoRA of rank 16,
all linear layers); one that waits does nothing. Other work on the machine slows both: only the ratio means something. A
row for each server: seconds of each round, completions per second (median), and seconds to send new weights and check
them (median).
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

from amortlm import LanguageModel, Policy, Support
from amortlm.cli.status import ending_on_signals
from amortlm.engine.adapter import default_lora
from amortlm.rollout import HTTPSampler
from amortlm.rollout.launch import Program, servable, servers

FORMS = ("adapter", "merged")
RANK = 16
ROW = {"x": "Once upon a time"}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--python", required=True)
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server-options", default="--enforce-eager --max-model-len 256")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    lm = LanguageModel.from_pretrained(given.model)
    support = Support(stop=".", min_tokens=given.tokens, max_tokens=given.tokens)
    policy = Policy(lm, "{x}", support, default_lora(RANK))
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.01)
    took: dict[str, list[float]] = {form: [] for form in FORMS}
    loading: dict[str, list[float]] = {form: [] for form in FORMS}
    with servable(given.model) as folder:
        options = ["--dtype", "float32", *shlex.split(given.server_options)]
        programs = [Program(given.python, folder, [*options, "--weights", form]) for form in FORMS]
        with servers(programs[0], 1) as (adapter,), servers(programs[1], 1) as (merged,):
            samplers = {"adapter": HTTPSampler(adapter, policy), "merged": HTTPSampler(merged, policy)}
            for turn in range(given.rounds + 1):  # the first one is not counted
                weights = {name: w * (1 + 0.01 * turn) for name, w in policy.weights().items()}
                for form, sampler in samplers.items():
                    load = seconds(partial(sampler.load, weights, turn + 1))
                    asked: dict[str, Any] = {"seed": turn, "sampler": sampler}
                    draw = seconds(partial(policy.sample, [ROW], given.completions, **asked))
                    if turn:
                        loading[form].append(load)
                        took[form].append(draw)
                    print(f"round {turn}, {form}: load {load:.1f} s, draw {draw:.1f} s", file=sys.stderr)
    middle = {form: statistics.median(took[form]) for form in FORMS}
    rows = []
    for form in FORMS:
        each = " ".join(f"{x:.1f}" for x in took[form])
        rows.append([form, each, given.completions / middle[form], statistics.median(loading[form])])
    print(
        tabulate(rows, ["weights", "seconds", "completions/s", "load, s"], floatfmt=".1f", tablefmt="github")
    )
    print(f"merged / adapter: {middle['adapter'] / middle['merged']:.1f} times the completions per second")


if __name__ == "__main__":
    with ending_on_signals():  # the servers end with the block that started them
        main()
