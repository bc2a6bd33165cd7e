"""Peak memory of what scores and samples, against the setting `memory_mb`.

python -m benchmarks.memory --settings 64 256 1024

Each case runs in a process of its own, after a small one of its kind has loaded what is loaded once. Its peak is the
most that the process held at once (VmHWM), less what it held before; Linux only. `--wide` takes a random Llama with
49,152 tokens in the place of a model, of which the embedded tokenizer knows the first. A case that takes more than
`--cap` GiB is ended.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the parent stays small
    from amortlm import LanguageModel, Posterior

MAX_TOKENS = 8
WIDE = 49_152
ROW = {"x": "Once upon a time there was a cat", "y": " The end. They were all very happy that day"}
LONG = {**ROW, "x": "Once upon a time there was a little cat. " * 91}  # 1,000 tokens


def language_model(name: str, setting: float) -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    from amortlm import LanguageModel

    lm = LanguageModel.from_pretrained("embedded" if name == "wide" else name, device="cpu")
    if name == "wide":
        config = LlamaConfig(
            vocab_size=WIDE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2048,
        )
        lm = LanguageModel(LlamaForCausalLM(config), lm.tokenizer, name="wide")
    lm.memory_mb = setting
    lm.context = None  # a prompt of 1,000 tokens is longer than the embedded model was made for
    return lm


def posterior(lm: LanguageModel, of: str) -> Posterior:
    from amortlm import Policy, Posterior, Support

    return Posterior(
        Policy(lm, "{x}", Support(stop=".", max_tokens=MAX_TOKENS)), lm.log_prob(of, given="{x}")
    )


def completions(it: Posterior, n: int) -> list[list[int]]:
    """n distinct ones of 1 to MAX_TOKENS random tokens."""
    rng, choices = random.Random(0), it.policy.support.allowed.nonzero().squeeze(1).tolist()
    return [rng.choices(choices, k=1 + i % MAX_TOKENS) for i in range(n)]


def log_prob(lm: LanguageModel, size: int, row: dict[str, str] = ROW) -> Callable[[], Any]:
    it = posterior(lm, "{z}")
    given = completions(it, size)
    return lambda: it.log_prob(row, given)


def sample(lm: LanguageModel, size: int, row: dict[str, str] = ROW) -> Callable[[], Any]:
    policy = posterior(lm, "{z}").policy
    return lambda: policy.sample([row], size)


def diagnose(lm: LanguageModel, size: int) -> Callable[[], Any]:
    it = posterior(lm, "{z}")
    return lambda: it.diagnose(ROW, n=size)


def suffix(lm: LanguageModel, size: int, row: dict[str, str] = ROW) -> Callable[[], Any]:
    it = posterior(lm, "{z}{y}")
    rollouts = it.policy.rollouts([row], [completions(it, size)])
    assert it.target is not None
    return lambda: it.target.score(rollouts)  # type: ignore[union-attr]


CASES: dict[str, tuple[Callable[..., Callable[[], Any]], int]] = {
    "log_prob of 22,620": (log_prob, 22_620),
    "sample 4,096": (sample, 4_096),
    "diagnose, n = 1,024": (diagnose, 1_024),
    "score 1,024 before a suffix": (suffix, 1_024),
    "log_prob of 256 after 1,000 tokens": (lambda lm, n: log_prob(lm, n, LONG), 256),
    "sample 256 after 1,000 tokens": (lambda lm, n: sample(lm, n, LONG), 256),
    "score 128 between 1,000 tokens and a suffix": (lambda lm, n: suffix(lm, n, LONG), 128),
}


def held(field: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" at most since it was set back."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def run(name: str, case: str, setting: float, cap: float) -> dict[str, float | None]:
    """CPU seconds and peak in MiB of a case, in this process."""
    import torch

    torch.set_num_threads(1)
    make, size = CASES[case]
    lm = language_model(name, setting)
    make(lm, 4)()
    ready = make(lm, size)
    limit = int((held("VmSize") + 1024 * cap) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    before, start = held("VmRSS"), time.process_time()
    try:
        ready()
    except (MemoryError, RuntimeError) as e:
        if "memory" not in str(e):
            raise
        return {"peak": None, "seconds": time.process_time() - start}
    return {"peak": held("VmHWM") - before, "seconds": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--settings", type=float, nargs="+", default=[64, 256, 1024], help="MiB")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="substrings of their names")
    parser.add_argument("--cap", type=float, default=8, help="GiB")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, case, setting = args.one
        print(json.dumps(run(name, case, float(setting), args.cap)))
        return
    name = "wide" if args.wide else args.model
    print(f"{name}\n\n| case | setting, MiB | peak, MiB | ratio | CPU seconds |\n|---|---|---|---|---|")
    for case in (c for c in CASES if any(part in c for part in args.cases)):
        for setting in args.settings:
            command = [sys.executable, "-m", "benchmarks.memory", "--cap", str(args.cap)]
            done = subprocess.run(
                [*command, "--one", name, case, str(setting)], stdout=subprocess.PIPE, text=True, check=True
            )
            got = json.loads(done.stdout.splitlines()[-1])
            peak = got["peak"]
            figures = "out of memory | -" if peak is None else f"{peak:.0f} | {peak / setting:.2f}"
            print(f"| {case} | {setting:g} | {figures} | {got['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
