"""p in a module tree of its own that shares q's tensors, or in q's with the adapter switched off: what does it cost?

python -m benchmarks.layout
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from amortlm import LanguageModel, Policy, Support

PAIRS = 40


def ratio(one: Callable[[], None], two: Callable[[], None]) -> float:
    """Median over pairs of time of `one` / time of `two`, in alternating order."""
    ratios = []
    for i in range(PAIRS):
        seconds = {}
        for run in (one, two) if i % 2 else (two, one):
            start = time.perf_counter()
            run()
            seconds[run] = time.perf_counter() - start
        ratios.append(seconds[one] / seconds[two])
    return statistics.median(ratios)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    lm = LanguageModel.from_pretrained("embedded", device="cpu")
    q = Policy(lm, "", Support(stop=".", max_tokens=20)).model
    for tokens in (24, 1):
        ids = torch.randint(10, 2000, (32, tokens))

        def switched_off(ids: torch.Tensor = ids) -> None:
            with q.disable_adapter():
                q(input_ids=ids, use_cache=False)

        def own_tree(ids: torch.Tensor = ids) -> None:
            lm.model(input_ids=ids, use_cache=False)

        print(f"32 texts of {tokens} tokens: one tree / two trees {ratio(switched_off, own_tree):.2f}")


if __name__ == "__main__":
    main()
