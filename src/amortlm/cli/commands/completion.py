"""amortlm completion: a script that completes commands in a shell."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from amortlm.errors import MissingExtraError


def run(args: Namespace) -> None:
    try:
        import shtab
    except ImportError as e:
        raise MissingExtraError("completion needs shtab: pip install 'amortlm[completion]'") from e
    _name_files(args.parser, shtab.FILE)
    print(shtab.complete(args.parser, args.shell))


def _name_files(parser: ArgumentParser, kind: object) -> None:
    """Mark the arguments that are files or folders, for their completion."""
    for action in parser._actions:
        for part in action.choices.values() if isinstance(action.choices, dict) else ():
            _name_files(part, kind)
        if action.dest in ("spec", "folder", "data", "output", "file"):
            vars(action)["complete"] = kind
