"""results.json, README.md and figures from the finished runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from tabulate import tabulate

from amortlm.files import write_text
from amortlm.lab.reproduce.storage import write_json

from .cases import CASES
from .figures import curves_figure, table_figure
from .methods import MAIN, MARK, METHODS, PARTICLES, PASSES
from .report_data import INFINITE, LEVELS, MISSING, ROWS, Runs, passes_to, reach, read_runs, values


def write_report(folder: Path, settings: dict[str, Any], command: str) -> None:
    runs = read_runs(folder)
    if not runs:
        return
    targets = [case.name for case in CASES if any(target == case.name for target, _ in runs)]
    results = {
        "command": command,
        "settings": settings,
        "runs": {f"{t} {m}": found for (t, m), found in sorted(runs.items())},
    }
    write_json(folder / "results.json", results)
    curves_figure(runs, targets, folder / "passes.png")
    table_figure(runs, targets, folder / "tv.png")
    write_text(folder / "README.md", readme(runs, targets, settings, command))


# Tables


def readme(runs: Runs, targets: list[str], settings: dict[str, Any], command: str) -> str:
    parts = [
        "# Every method against the same truth",
        introduction(targets, settings),
        f"```bash\n{command}\n```",
        "![TV against passes](passes.png)",
        "Bands: between the two bounds of SMC, whose law is simulated; a flat end is the noise of the simulation.",
        "## What holds",
        "\n".join(f"- {line}" for line in claims(runs, targets)),
        f"## Passes to TV ≤ {MARK}",
        passes_table(runs, targets),
        "SMC with the prompted model is given the lower bound of its distance. break-even: outputs after which "
        f"training and {MAIN} + SIR have cost fewer passes than SMC. –: not reached with the passes tried "
        f"(SMC {PARTICLES[-1]:,}, others {PASSES[-1]:,}).",
        "## The targets",
        targets_table(runs, targets),
        f"accepted: probability of R > 0 under the prompted model, and (trained) under {MAIN}; ESS: the "
        "prompted model as a proposal, 1 at best; "
        "perplexity: of the posterior; floor: TV that 1,000 exact draws would show.",
        "## Total variation",
        "![TV of every method](tv.png)",
        figure_table(runs, targets, "tv", ".3f"),
        "Of SMC, the upper bound of the simulated distance.",
        "## KL(q‖p), nats",
        figure_table(runs, targets, "kl_qp", ".2f"),
        "## KL(p‖q), nats",
        figure_table(runs, targets, "kl_pq", ".2f"),
        "Both are of the law given an output. ∞: one has mass where the other has none, as all policies have on a hard "
        "constraint. A simulated law (SMC) has no KL.",
        "## Modes found",
        "Expected share of the posterior's 20 likeliest completions that 200 independent outputs contain; "
        "rejection that ends shows the share of exact draws.",
        figure_table(runs, targets, "modes", ".2f"),
        "## Cost",
        cost_table(runs, targets),
        "## Why",
        reasons(),
        "## Settings",
        notes(),
        "Made with:",
        "\n".join(f"- {line}" for line in environments(runs)),
        "Every figure, all curves and seeds: [results.json](results.json). The same command goes on where it was "
        "interrupted.",
    ]
    return "\n\n".join(parts) + "\n"


def introduction(targets: list[str], settings: dict[str, Any]) -> str:
    updates, samples = settings["updates"], settings["samples"]
    return (
        f"{len(targets)} targets on the {settings['model']} model, each with every completion scored. The law of "
        "one output of each method is exact (of SMC: simulated on the enumerated tree), so that the distances need no "
        "samples and have no floor. A pass is a completion drawn and judged; passes are for one output. Trained "
        f"methods saw {updates * samples:,} completions each ({updates} updates of {samples})."
    )


def reasons() -> str:
    return (
        "- SMC resamples by the weight of stopping now, tempered by the mean over the particles. Where likely "
        "completions go on from a prefix at which stopping is far less likely than elsewhere (an ending that fits "
        "`very excited` does not fit `very`), it thins out the prefixes that matter, and needs more particles than "
        "plain SIR. So it does with a policy that is right only where completions end (VarGrad, TB).\n"
        "- A constraint that the prompted model meets once in 10^3 to 10^6 draws: training sees few or no completions "
        "with R > 0. What it learns from the others, the model's own law on this support, can make them rarer "
        "(accepted, trained); then q is a worse proposal than the prompted model.\n"
        "- Told: the same posterior, and the support has the constraint as a pattern (`Support(pattern=...)`). Every "
        "draw counts, and training sees nothing else. What stays hard is what the pattern says nothing of: of "
        "contains-rare, `boy farmer` and `farmer boy` are .08, and the masked model writes either once in 10^7 draws, "
        "for it would rather put a likely word in between and be forced to end with the missing one."
    )


def notes() -> str:
    return (
        "Rejection knows the largest R / q, which only enumeration tells. SFT trains on exact draws of the posterior, "
        "which only an oracle has. PPO maximises E[log R - log q_0] with a KL penalty of weight 1: its optimum is the "
        "posterior. GRPO is used as it usually is, with advantages divided by their spread and a small KL penalty: its "
        "optimum is not. SubTB and DB do not apply to a verifier of finished text. What can end with no output "
        "(rejection; SIR and SMC with all weights zero) has that probability counted as wrong."
    )


def claims(runs: Runs, targets: list[str]) -> list[str]:
    def reached(method: str) -> tuple[list[str], list[str]]:
        """By the upper bound of a simulated distance."""
        known = [t for t in targets if (t, method) in runs]
        curves = {t: [run["curves"][method] for run in runs[t, method]] for t in known}
        good = [t for t in known if all(reach(curve, MARK, "tv") is not None for curve in curves[t])]
        return good, [t for t in known if t not in good]

    out = []
    for label, method in (("SMC", "smc"), ("MH", "mh")):
        good, bad = reached(method)
        rest = f"; not on {', '.join(bad)} within the passes tried" if bad else ""
        out.append(
            f"{label} with the prompted model reaches TV ≤ {MARK} on {len(good)} of {len(targets)} targets{rest}."
        )
    for level in LEVELS:
        out.append(_tenth_line(runs, targets, level, "SMC", ("smc",)))
    out.append(_tenth_line(runs, targets, MARK, "the quickest of SIR, MH and SMC", ("sir", "mh", "smc")))
    return out


def _tenth_line(runs: Runs, targets: list[str], level: float, label: str, others: Sequence[str]) -> str:
    won, lost = tenth(runs, targets, level, others)
    rest = f"; not on {', '.join(lost)}" if lost else ""
    return (
        f"{MAIN} + SIR reaches TV ≤ {level} with at most a tenth of the passes of {label} with the prompted model on "
        f"{len(won)} of {len(won) + len(lost)} targets{rest}."
    )


def tenth(runs: Runs, targets: list[str], level: float, others: Sequence[str]) -> tuple[list[str], list[str]]:
    """(targets where the trained proposal with SIR needs at most a tenth of the passes of the quickest of the untrained
    samplers, the other targets). Where none of those gets there, the passes that were tried count."""
    won: list[str] = []
    lost: list[str] = []
    for t in targets:
        if not {(t, MAIN), *((t, o) for o in others)} <= set(runs):
            continue
        ours = passes_to(runs, t, MAIN, "sir", level)
        theirs = [passes_to(runs, t, o, o, level) for o in others]
        known = [n for n in theirs if n is not None] or [PASSES[-1]]
        (won if ours is not None and ours <= min(known) / 10 else lost).append(t)
    return won, lost


def passes_table(runs: Runs, targets: list[str]) -> str:
    columns = [
        ("rejection", "rejection", "rejection"),
        ("SIR", "sir", "sir"),
        ("MH", "mh", "mh"),
        ("SMC", "smc", "smc"),
        *((f"{MAIN} + {c.upper()}", MAIN, c) for c in ("sir", "mh", "smc")),
        *((f"{name} + SIR", name, "sir") for name in ("forward-kl", "sft")),
    ]
    lines = []
    for t in targets:
        found = {label: passes_to(runs, t, method, curve, MARK) for label, method, curve in columns}
        theirs, ours = found["SMC"], found[f"{MAIN} + SIR"]
        ratio = f"{theirs / ours:,.1f}" if theirs and ours else MISSING
        even = MISSING
        if theirs and ours and theirs > ours:
            even = f"{runs[t, MAIN][0]['training_passes'] / (theirs - ours):,.0f}"
        lines.append([t, *(_count(v) for v in found.values()), ratio, even])
    return _table(["target", *(c[0] for c in columns), "SMC / ours", "break-even"], lines)


def targets_table(runs: Runs, targets: list[str]) -> str:
    lines = []
    for t in targets:
        facts = next(found[0]["facts"] for (target, _), found in runs.items() if target == t)
        learned = next((run["accepted"] for run in runs.get((t, MAIN), []) if "accepted" in run), None)
        lines.append(
            [
                t,
                f"{facts['completions']:,}",
                f"{facts['accepted']:.2g}",
                f"{learned:.2g}" if learned is not None else MISSING,
                f"{facts['ess']:.2g}",
                f"{facts['perplexity']:.1f}",
                f"{facts['log_z']:.2f}",
                f"{facts['floor_1000']:.3f}",
            ]
        )
    return _table(
        ["target", "completions", "accepted", "trained", "ESS", "perplexity", "log Z", "floor"], lines
    )


def figure_table(runs: Runs, targets: list[str], key: str, form: str) -> str:
    lines = []
    for row in ROWS:
        cells = [values(runs, t, row, key) for t in targets]
        if any(cells):
            flat = [mean(c) for c in cells if c]
            lines.append([row[0], *(_spread(c, form) for c in cells), _format(median(flat), form)])
    return _table(["", *targets, "median"], lines)


def cost_table(runs: Runs, targets: list[str]) -> str:
    lines = []
    for name in METHODS:
        found = [run for t in targets for run in runs.get((t, name), [])]
        if found:
            seeds = max(len(runs.get((t, name), [])) for t in targets)
            lines.append(
                [
                    name,
                    f"{found[0]['training_passes']:,}",
                    f"{mean(r['training_seconds'] for r in found):.1f}",
                    f"{mean(r['seconds'] - r['training_seconds'] for r in found):.1f}",
                    seeds,
                ]
            )
    return _table(["method", "training passes", "training, s", "laws, s", "seeds"], lines)


def environments(runs: Runs) -> list[str]:
    out = []
    for found in runs.values():
        for run in found:
            made = run["environment"]
            packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
            commit = f"; commit {made['commit']}" if made["commit"] else ""
            where = f"{made['cpu']}, {made['cores']} cores, {made['threads']} threads"
            out.append(f"{where}; Python {made['python']}; {packages}{commit}")
    return list(dict.fromkeys(out))


def _table(headers: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(lines, headers=headers, tablefmt="github", colalign=align, disable_numparse=True)


def _format(value: float, form: str) -> str:
    return INFINITE if math.isinf(value) else format(value, form)


def _spread(found: Sequence[float], form: str) -> str:
    if not found:
        return MISSING
    text = _format(mean(found), form)
    return f"{text} ± {stdev(found):{form}}" if len(found) > 1 and math.isfinite(sum(found)) else text


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.1f}" if value < 10 else f"{value:,.0f}"
