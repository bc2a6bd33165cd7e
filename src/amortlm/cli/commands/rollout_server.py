"""amortlm rollout-server: vLLM as a server of completions, in the foreground."""

from __future__ import annotations

from argparse import Namespace

from amortlm.rollout import launch


def run(args: Namespace) -> int:
    with launch.servable(args.model) as model:
        return launch.run([args.python, "-m", "amortlm_vllm", model, *args.options])
