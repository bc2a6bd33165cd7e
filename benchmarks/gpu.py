"""The experiments on a real model on one GPU, each within a time limit.

    python -m benchmarks.gpu --data ../shared/data --output gpu [--minutes 1.5] [--preset real] [--seeds 1] [--model M]

`--data` holds the folders of `DATA`; an experiment whose folder is missing takes its own data, or says that it needs
some. An experiment that is out of time is asked to end: it saves a checkpoint, and the same command goes on from there.
After each one its tables and figures are packed into `--output`, one file an experiment, beside the log and what the
machine is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

from amortlm.lab.experiments import EXPERIMENTS, PRESETS

DATA = {
    "continuation": "openwebtext",
    "infilling": "rocstories",
    "subjectivity": "subj",
    "arithmetic": "arithmetic",
}
KEPT = ("results.json", "digest.json", "README.md", "*.png")  # of a run's folder
GRACE = 20  # seconds for a checkpoint
AMORTLM = [sys.executable, "-c", "import sys; from amortlm.cli import main; sys.exit(main())"]


def command(experiment: str, args: argparse.Namespace) -> list[str]:
    options = ["--preset", args.preset, "--seeds", str(args.seeds), "--output", str(args.work / experiment)]
    if args.model:
        options += ["--model", args.model]
    folder = args.data / DATA[experiment] if args.data and experiment in DATA else None
    if folder is not None and folder.exists():
        options += ["--data", str(folder)]
    return [*AMORTLM, "reproduce", experiment, *options]


def run(experiment: str, args: argparse.Namespace) -> dict[str, float | int | None]:
    """One experiment, its lines added to the log; returns its exit status (None: ended for time) and seconds."""
    start = time.monotonic()
    with (args.output / "gpu.log").open("ab") as log:
        process = subprocess.Popen(command(experiment, args), stdout=log, stderr=subprocess.STDOUT)
        try:
            status: int | None = process.wait(args.minutes * 60)
        except subprocess.TimeoutExpired:
            status = None
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
    return {"status": status, "seconds": round(time.monotonic() - start, 1)}


def keep(folder: Path, file: Path) -> list[str]:
    """Pack tables and figures of a run; returns their names."""
    found = sorted(path for pattern in KEPT for path in folder.glob(pattern))
    if found:
        with tarfile.open(file, "w:gz") as archive:
            for path in found:
                archive.add(path, path.name)
    return [path.name for path in found]


def machine() -> dict[str, str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"device": name, "torch": torch.__version__, "python": sys.version.split()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--preset", choices=PRESETS, default="real")
    parser.add_argument("--model", help="(default: the preset's)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.5, help="of each experiment")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder of the runs")
    parser.add_argument("--output", type=Path, required=True, help="folder of what is kept")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    summary: dict[str, object] = {"machine": machine()}
    for experiment in args.experiments:
        ended = run(experiment, args)
        files = keep(args.work / experiment, args.output / f"{experiment}.tar.gz")
        summary[experiment] = {**ended, "files": files}
        (args.output / "gpu.json").write_text(json.dumps(summary, indent=1))
        print(f"{experiment}: {summary[experiment]}", flush=True)


if __name__ == "__main__":
    main()
