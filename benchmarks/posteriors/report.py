"""README.md of the finished runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median, stdev

from amortlm.lab.experiment import Results, Settings
from amortlm.lab.report import MISSING, code, commands, environments, grid

from .cases import HELD_OUT
from .digest import COLUMNS, LEVELS, Digest
from .methods import MAIN, MARK, METHODS, PARTICLES, PASSES

QUESTION = "Every method against the same truth: how many passes does an output near the posterior cost?"
INFINITE = "∞"
OURS = f"{MAIN} + SIR"


def readme(results: Results) -> str:
    found: Digest = results["digest"]
    parts = [
        "# Every method against the same truth",
        introduction(len(found["facts"]), results["settings"]),
        code(commands(results)),
        "![TV against passes](passes.png)",
        "Bands: between the two bounds of SMC, whose law is simulated; a flat end is the noise of the simulation.",
        "## What holds",
        "\n".join(f"- {line}" for line in claims(found)),
        f"## Passes to TV ≤ {MARK}",
        passes_table(results),
        "SMC with the prompted model is given the lower bound of its distance. break-even: outputs after which "
        f"training and {MAIN} + SIR have cost fewer passes than SMC. –: not reached with the passes tried "
        f"(SMC {PARTICLES[-1]:,}, others {PASSES[-1]:,}).",
        "## The targets",
        targets_table(results),
        f"accepted: probability of R > 0 under the prompted model, and (trained) under {MAIN}; ESS: the "
        "prompted model as a proposal, 1 at best; "
        "perplexity: of the posterior; floor: TV that 1,000 exact draws would show.",
        "## Total variation",
        "![TV of every method](tv.png)",
        figure_table(found, "tv", ".3f"),
        "Of SMC, the upper bound of the simulated distance.",
        "## KL(q‖p), nats",
        figure_table(found, "kl_qp", ".2f"),
        "## KL(p‖q), nats",
        figure_table(found, "kl_pq", ".2f"),
        "Both are of the law given an output. ∞: one has mass where the other has none, as all policies have on a hard "
        "constraint. A simulated law (SMC) has no KL.",
        "## Modes found",
        "Expected share of the posterior's 20 likeliest completions that 200 independent outputs contain; "
        "rejection that ends shows the share of exact draws.",
        figure_table(found, "modes", ".2f"),
        "## Cost",
        cost_table(results),
        "## Why",
        reasons(),
        "## Settings",
        notes(),
        "Made with:",
        "\n".join(f"- {line}" for line in environments(results)),
        "Every figure, all settings and all seeds: [results.json](results.json). The same command goes on where it was "
        "interrupted.",
    ]
    return "\n\n".join(parts) + "\n"


def introduction(targets: int, settings: Settings) -> str:
    updates, samples = settings["updates"], settings["samples"]
    return (
        f"{targets} target{'s' * (targets > 1)}, of {settings['model']}, every completion scored. The law of "
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


def claims(found: Digest) -> list[str]:
    out = []
    for label in ("SMC", "MH"):  # by the upper bound of a simulated distance
        upper = {t: of[label] for t, of in found["upper"].items() if label in of}
        bad = [t for t, passes in upper.items() if passes is None]
        rest = f"; not on {', '.join(bad)} within the passes tried" if bad else ""
        out.append(
            f"{label} with the prompted model reaches TV ≤ {MARK} on {len(upper) - len(bad)} of {len(found['facts'])} "
            f"targets{rest}."
        )
    out += [_tenth_line(found, level, "SMC", ("SMC",)) for level in LEVELS]
    out.append(_tenth_line(found, MARK, "the quickest of SIR, MH and SMC", ("SIR", "MH", "SMC")))
    return [*out, *_alone_lines(found)]


def _alone_lines(found: Digest) -> list[str]:
    """On how many targets every seed of the trained sampler is near with one pass, and on how many held-out ones."""
    if MAIN not in found["rows"]["tv"]:
        return []
    cells = dict(zip(found["facts"], found["rows"]["tv"][MAIN], strict=True))
    near = {t: max(seeds) <= MARK for t, seeds in cells.items() if seeds}
    bad = [t for t, ok in near.items() if not ok]
    rest = f"; not on {', '.join(bad)}" if bad else ""
    lines = [
        f"Every seed of {MAIN} alone, one pass for an output, is at TV ≤ {MARK} on {sum(near.values())} of {len(near)} "
        f"targets{rest}."
    ]
    held = [t for t in HELD_OUT if t in near]
    if held:
        lines.append(
            f"Of those that no setting was chosen on ({', '.join(held)}) it is so on {sum(near[t] for t in held)}."
        )
    return lines


def _tenth_line(found: Digest, level: float, label: str, others: Sequence[str]) -> str:
    won, lost = tenth(found, level, others)
    rest = f"; not on {', '.join(lost)}" if lost else ""
    return (
        f"{OURS} reaches TV ≤ {level} with at most a tenth of the passes of {label} with the prompted model on "
        f"{len(won)} of {len(won) + len(lost)} targets{rest}."
    )


def tenth(found: Digest, level: float, others: Sequence[str]) -> tuple[list[str], list[str]]:
    """(targets where the trained proposal with SIR needs at most a tenth of the passes of the quickest of the untrained
    samplers, the other targets). Where none of those gets there, the passes that were tried count."""
    won: list[str] = []
    lost: list[str] = []
    for t, passes in found["passes"][str(level)].items():
        if not {OURS, *others} <= passes.keys():
            continue
        ours = passes[OURS]
        known = [passes[o] for o in others if passes[o] is not None] or [PASSES[-1]]
        (won if ours is not None and ours <= min(known) / 10 else lost).append(t)
    return won, lost


def passes_table(results: Results) -> str:
    labels = [label for label, *_ in COLUMNS]
    lines = []
    for t, passes in results["digest"]["passes"][str(MARK)].items():
        theirs, ours = passes.get("SMC"), passes.get(OURS)
        ratio = f"{theirs / ours:,.1f}" if theirs and ours else MISSING
        even = MISSING
        if theirs and ours and theirs > ours:
            training = results["runs"][f"{t} {MAIN}"][0]["reward_evaluations"]
            even = f"{training / (theirs - ours):,.0f}"
        lines.append([t, *(_count(passes.get(label)) for label in labels), ratio, even])
    return grid(["target", *labels, "SMC / ours", "break-even"], lines)


def targets_table(results: Results) -> str:
    lines = []
    for t, facts in results["digest"]["facts"].items():
        learned = [run["details"]["accepted"] for run in results["runs"].get(f"{t} {MAIN}", [])]
        lines.append(
            [
                t,
                f"{facts['completions']:,}",
                f"{facts['accepted']:.2g}",
                f"{learned[0]:.2g}" if learned else MISSING,
                f"{facts['ess']:.2g}",
                f"{facts['perplexity']:.1f}",
                f"{facts['log_z']:.2f}",
                f"{facts['floor_1000']:.3f}",
            ]
        )
    return grid(
        ["target", "completions", "accepted", "trained", "ESS", "perplexity", "log Z", "floor"], lines
    )


def figure_table(found: Digest, key: str, form: str) -> str:
    lines = []
    for label, stated in found["rows"][key].items():
        cells = [[math.inf if v is None else v for v in of] for of in stated]  # JSON has no infinity
        typical = median(mean(of) for of in cells if of)
        lines.append([label, *(_spread(of, form) for of in cells), _format(typical, form)])
    return grid(["", *found["facts"], "median"], lines)


def cost_table(results: Results) -> str:
    lines = []
    for name in METHODS:
        by_target = [results["runs"].get(f"{t} {name}", []) for t in results["digest"]["facts"]]
        found = [run for of in by_target for run in of]
        if found:
            lines.append(
                [
                    name,
                    f"{found[0]['reward_evaluations']:,}",
                    f"{mean(run['details']['training_seconds'] for run in found):.1f}",
                    f"{mean(run['seconds']['evaluation'] for run in found):.1f}",
                    max(map(len, by_target)),
                ]
            )
    return grid(["method", "training passes", "training, s", "laws, s", "seeds"], lines)


def _format(value: float, form: str) -> str:
    return INFINITE if math.isinf(value) else format(value, form)


def _spread(found: Sequence[float], form: str) -> str:
    if not found:
        return MISSING
    text = _format(mean(found), form)
    return f"{text} ± {stdev(found):{form}}" if len(found) > 1 and math.isfinite(sum(found)) else text


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.1f}" if value < 10 else f"{value:,.0f}"
