"""amortlm push: upload a saved posterior to the hub."""

from __future__ import annotations

from argparse import Namespace

from amortlm import hub


def run(args: Namespace) -> None:
    url = hub.push(
        args.folder,
        args.repo,
        private=args.private or None,
        commit_message=args.message,
        allow_local_model=args.allow_local_model,
    )
    print(f"pushed to {url}")
