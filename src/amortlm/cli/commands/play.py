"""amortlm play: a page in the browser."""

from __future__ import annotations

from argparse import Namespace

from amortlm.cli.commands.serve import serving
from amortlm.cli.loading import posterior_of
from amortlm.language_model import LanguageModel


def run(args: Namespace) -> None:
    from amortlm.serve import create_play

    if args.folder is None:
        model = args.model or "embedded"
        serving(args, model, lambda settings: create_play(LanguageModel.from_pretrained(model), **settings))
    else:
        serving(args, args.folder, lambda settings: create_play(posterior_of(args), **settings))
