"""The commands and their options. Slow imports happen in the commands."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from amortlm import __version__
from amortlm.errors import nearest

SHELLS = ("bash", "zsh", "fish")


class _Parser(argparse.ArgumentParser):
    """Answers what it does not know with the usage and the nearest option of the command, not of `amortlm`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = f"; {nearest(unknown[0], self._option_string_actions)}" if unknown[0][0] == "-" else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="amortlm",
        description="Make a language model sample from posteriors that it defines but cannot sample.",
    )
    parser.add_argument("--version", action="version", version=f"amortlm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    _add_train(commands.add_parser("train", help="train a sampler for a task or a YAML file"))
    _add_sample(commands.add_parser("sample", help="draw from a saved posterior"))
    _add_evaluate(
        commands.add_parser("evaluate", help="measure how far a saved sampler is from the posterior")
    )
    _add_report(commands.add_parser("report", help="write an HTML page about one or several runs"))
    _add_table(commands.add_parser("table", help="list the most probable completions of a posterior"))
    _add_serve(commands.add_parser("serve", help="serve a saved posterior over HTTP; see docs/serving.md"))
    _add_play(
        commands.add_parser("play", help="a page in the browser to try a posterior; see docs/serving.md")
    )
    _add_launch(
        commands.add_parser(
            "launch", help="servers of completions, and a training with them; see docs/scale.md"
        )
    )
    _add_rollout_server(
        commands.add_parser("rollout-server", help="a server of completions, with vLLM; see docs/scale.md")
    )
    doctor = commands.add_parser(
        "doctor",
        help="versions; which kinds of passes are exact for a model, and whether sampling equals scoring there; "
        "see docs/models.md",
    )
    doctor.add_argument(
        "model",
        nargs="?",
        default="embedded",
        help="hub name or local folder (default: the model that ships)",
    )
    doctor.add_argument("--json", action="store_true", help="JSON instead of lines")
    _add_push(commands.add_parser("push", help="upload a saved posterior to the hub; see docs/publishing.md"))
    _add_reproduce(commands.add_parser("reproduce", help="run one of the paper's experiments"))
    new = commands.add_parser("new", help="write a commented YAML file for a posterior of your own")
    new.add_argument("file", help="the file to write, NAME.yaml; it must not exist")
    completion = commands.add_parser("completion", help="print a script that completes commands in a shell")
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(parser=parser)
    return parser


def _add_train(parser: argparse.ArgumentParser, plan: bool = True) -> None:
    from amortlm.lab.tasks import TASKS

    parser.add_argument("spec", help=f"a task ({', '.join(TASKS)}) or a YAML file; see docs/yaml.md")
    parser.add_argument("--model", help="hub name or local folder (default: the spec's)")
    parser.add_argument("--data", help="rows as .jsonl, .json, .csv or .tsv (default: the spec's)")
    parser.add_argument("--output", help="output folder (default: runs/NAME)")
    _add_trust(parser)
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint")
    again.add_argument("--overwrite", action="store_true", help="delete the run that the output folder holds")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any GFNConfig field, e.g. max_steps=50",
    )
    if plan:
        parser.add_argument(
            "--plan",
            nargs="?",
            const="here",
            choices=("here", "float32", "bfloat16", "float16", "nf4"),
            metavar="DTYPE",
            help="say what memory the run takes, with weights of this dtype, and load nothing; see docs/scale.md",
        )


def _add_launch(parser: argparse.ArgumentParser) -> None:
    _add_train(parser, plan=False)
    _add_python(parser)
    parser.add_argument("--servers", type=int, default=1, help="how many (default 1)")
    parser.add_argument(
        "--server-options",
        default="",
        metavar="OPTIONS",
        help="options of the servers as one text, as in '--dtype float32'",
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="place the servers on a Ray cluster (auto, local, or an address)"
    )


def _add_rollout_server(parser: argparse.ArgumentParser) -> None:
    _add_python(parser)
    parser.add_argument("model", help="the frozen model: hub name, local folder or GGUF file")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, help="options of the server, such as --dtype float32 --port 8001"
    )


def _add_python(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="the interpreter of the environment that has vLLM and servers/vllm (default: this one)",
    )


def _add_sample(parser: argparse.ArgumentParser) -> None:
    _add_posterior(parser)
    parser.add_argument("-n", type=int, default=5, help="completions per row (default 5)")
    parser.add_argument(
        "--correct",
        default="none",
        metavar="METHOD",
        help="sir, smc or mh: corrections that converge to the posterior as the budget grows; see docs/inference.md",
    )
    parser.add_argument(
        "--budget", type=int, help="completions drawn for a correction (default 256, or 16 n if that is more)"
    )
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_posterior(parser)
    parser.add_argument(
        "-n",
        type=int,
        default=256,
        help="samples per row (default 256; with fewer, a bad sampler looks better)",
    )
    parser.add_argument("--rows", type=int, default=8, help="largest number of rows (default 8)")
    parser.add_argument(
        "--level", type=float, help="probability with which the intervals hold (default 0.99)"
    )
    parser.add_argument("--gold", metavar="COLUMN", help="a column with a completion known to be good")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run no Markov chains, which take most of the time; a row that needs them is not decided",
    )
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.add_argument(
        "--card", action="store_true", help="write the figures and samples into the model card in the folder"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the certificate in the folder. Exit status 0: it holds, 1: it does not, 2: it could not be checked",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="folder", help="folders of runs; several are compared")
    parser.add_argument("--output", help="the page (default: report.html in the first folder)")
    parser.add_argument(
        "-n", type=int, default=256, help="samples for each prompt of a diagnosis (default 256)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="only what training wrote down: load no model, measure nothing"
    )
    parser.add_argument("--model", help="the frozen model, if it has moved since training")
    _add_trust(parser)
    parser.add_argument("--seed", type=int, default=0)


def _add_table(parser: argparse.ArgumentParser) -> None:
    _add_posterior(parser)
    parser.add_argument(
        "-n",
        type=int,
        default=256,
        help="draws that find completions, where the support is too large to enumerate",
    )
    parser.add_argument("--top", type=int, default=20, help="completions listed (default 20)")
    parser.add_argument(
        "--limit", type=int, default=200_000, help="largest support that is enumerated (default 200000)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON line for each row")


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a folder written by `amortlm train` or Posterior.save_pretrained")
    parser.add_argument("repo", help="name on the hub, user/name")
    parser.add_argument("--private", action="store_true", help="for a new repository")
    parser.add_argument("--message", help="message of the commit")
    parser.add_argument(
        "--allow-local-model",
        action="store_true",
        help="also if the base model is on this machine only; its path is left out",
    )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    parser.add_argument(
        "--rollout",
        nargs="+",
        default=[],
        metavar="URL",
        help="draw by these servers of completions (vLLM); see docs/scale.md",
    )
    _add_service(parser)


def _add_play(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser, nargs="?")
    _add_service(parser)


def _add_service(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="name of the model in requests (default: that of the folder)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1; others need a key in AMORTLM_API_KEY)",
    )
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 for a free one")
    parser.add_argument("--max-n", type=int, default=128, help="completions of a request (default 128)")
    parser.add_argument(
        "--max-draws",
        type=int,
        default=4096,
        help="completions that a correction, an estimate or a diagnosis may draw (default 4096)",
    )
    parser.add_argument("--max-body", type=int, default=2**20, help="bytes of a request (default 1 MiB)")
    parser.add_argument("--max-queue", type=int, default=128, help="requests that wait (default 128)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for a request (default 60)")


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    from amortlm.lab.command import add_options
    from amortlm.lab.experiments import EXPERIMENTS, PRESETS

    parser.add_argument("experiment", choices=EXPERIMENTS, help="see docs/reproduce.md")
    add_options(parser, PRESETS)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number of processes that share the runs (default 1)"
    )


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module, or a .py file, whose functions the target may call; its code is run (may be repeated)",
    )


def _add_folder(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument(
        "folder",
        nargs=nargs,
        help="a folder written by `amortlm train` or Posterior.save_pretrained, or user/name on the hub",
    )
    parser.add_argument("--revision", help="branch, tag or commit, for a name on the hub")
    parser.add_argument("--model", help="the frozen model, if it has moved since training")
    _add_trust(parser)


def _add_posterior(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    parser.add_argument("--data", help="rows as .jsonl, .json, .csv or .tsv")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="one row on the command line, e.g. x='...'",
    )
    parser.add_argument("--seed", type=int, default=0)
