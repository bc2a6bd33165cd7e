"""Which causal architectures of transformers does amortlm compute rightly? Tiny models against plain forward passes.

    python -m benchmarks.architectures [--only mistral gemma3_text] [--json FILE] [--markdown docs/models.md]

Each quantity is compared with passes of one sequence at a time, without cache, padding, positions or masks: what the
model says when nothing is shared. "exact" is within 1e-4 nats, and 1e-5 of the gradient's norm.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from amortlm import LanguageModel, Policy, Rollouts, Support, Target
from amortlm.errors import AmortLMError
from amortlm.targets.lm import LogProb

from .zoo import KINDS, UNBUILT, Case, cases

TOLERANCE = 1e-4  # nats, of a log-probability with weight 1
GRADIENT = 1e-5  # of its norm
SECONDS = 60  # of CPU time, for one model

# Prompts of one token, of two, and longer than zoo.WINDOW. Completions as long as the support allows, and shorter.
LONG = "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it because"
ROWS = (
    {"x": "", "y": "Then he ran."},
    {"x": "Tom", "y": "He was sad."},
    {"x": LONG, "y": "The end."},
)
COMPLETIONS = (" went to the park with his friend and saw a dog", " saw a dog")
SUPPORT = Support(stop=".", max_tokens=10)
TARGETS: dict[str, Callable[[LanguageModel], Target]] = {
    "{z}": lambda lm: lm.log_prob("{z}", given="{x}"),
    "{z} {y}": lambda lm: lm.log_prob("{z} {y}", given="{x}"),
    "contrastive": lambda lm: 1.5 * lm.log_prob("{z}", given="{x}") - 0.5 * lm.log_prob("{z}"),
}


class Cell(NamedTuple):
    """What came of one quantity: exact, wrong (off by so much), refused or error (with the message)."""

    outcome: str
    off: float | None = None
    message: str = ""

    def __str__(self) -> str:
        return self.outcome if self.off is None or self.outcome == "exact" else f"{self.off:.2g}"


@dataclass(frozen=True)
class Measured:
    name: str
    kind: str
    cells: dict[str, Cell]
    seconds: float
    way: str = ""

    @property
    def outcome(self) -> str:
        """The worst of the cells; refused only if nothing is computed."""
        found = {cell.outcome for cell in self.cells.values()}
        for outcome in ("wrong", "error", "exact"):
            if outcome in found:
                return outcome
        return "refused"


class Plain:
    """A model's word: passes of one sequence at a time, with nothing but its tokens."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._logits: dict[tuple[int, ...], Tensor] = {}

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[len(ids), V], with a gradient where the model has one."""
        if torch.is_grad_enabled():
            return self._pass(ids)
        key = tuple(ids)
        if key not in self._logits:
            self._logits[key] = self._pass(ids)
        return self._logits[key]

    def _pass(self, ids: Sequence[int]) -> Tensor:
        return self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]

    def log_prob(self, ids: Sequence[int], first: int) -> Tensor:
        """log p(ids[first:] | ids[:first])."""
        logits = self.logits(ids[:-1])[first - 1 :].double()
        return (_pick(logits, ids[first:]) - logits.logsumexp(1)).sum()

    def log_q(self, policy: Policy, prompt: Sequence[int], z: Sequence[int]) -> tuple[Tensor, Tensor]:
        """log q of each token of z [T], and of stopping at each state [T+1], on the policy's support."""
        support, state = policy.support, torch.arange(len(z) + 1)
        logits = self.logits([*prompt, *z])[len(prompt) - 1 :].double()
        end = logits[:, list(support.stop_ids)].logsumexp(1)
        end = torch.where(state < support.min_tokens, -torch.inf, end)
        norm = torch.logaddexp(logits[:, support.allowed].logsumexp(1), end)
        log_pf = _pick(logits, z) - norm[:-1]
        return log_pf, torch.where(state == support.max_tokens, 0.0, end - norm)


class Bench:
    """A model, its policies and what they should say."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str):
        self.plain = Plain(copy.deepcopy(model).requires_grad_(False).eval())
        self.before = {k: v.clone() for k, v in model.state_dict().items()}
        self.lm = LanguageModel(model, tokenizer, name=name)
        self.policy = Policy(self.lm, "{x}", SUPPORT, "full")
        self.prompts = self.policy.encode_rows(ROWS)
        texts = [self.lm.encode_continuation(c)[: SUPPORT.max_tokens] for c in COMPLETIONS]
        self.rollouts = self.policy.rollouts(ROWS, [texts] * len(ROWS))

    def causal(self) -> float:
        """Does the model say the same of a text whatever follows it? By plain passes alone."""
        off = 0.0
        for n, z in _trajectories(self.rollouts):
            ids = [*self.prompts[n], *z]
            for end in {len(self.prompts[n]), len(ids) - 1}:
                whole, alone = (self.plain.logits(part)[end - 1].log_softmax(-1) for part in (ids, ids[:end]))
                off = max(off, _apart(whole, alone))
        return off

    def evaluate(self) -> float:
        self.policy.eval()
        return self._off_log_q(self.rollouts, self.policy)

    def sample(self) -> float:
        rollouts, found = self.policy.eval().sample(ROWS, 3)
        return self._off_log_q(rollouts, self.policy, found)

    def _off_log_q(self, rollouts: Rollouts, policy: Policy, found: Any = None) -> float:
        """How far log q is from the plain passes: of tokens, of stopping at every state, and of whole completions."""
        with torch.no_grad():
            found = policy.evaluate(rollouts) if found is None else found
        final, off = found.final(rollouts.lengths), 0.0
        for b, (n, z) in enumerate(_trajectories(rollouts)):
            log_pf, log_stop = self.plain.log_q(policy, self.prompts[n], z)
            off = max(
                off,
                _apart(found.log_pf[b, : len(z)], log_pf),
                _apart(found.log_pterm[b, : len(z) + 1], log_stop),
                _apart(final[b], log_pf.sum() + log_stop[-1]),
            )
        return off

    def target(self, name: str) -> float:
        """How far log R is from the plain passes, at every state that may stop, for a weight of 1 in all."""
        target = TARGETS[name](self.lm)
        found, off = target.score(self.rollouts), 0.0
        (stop,) = self.rollouts.stop_ids
        for b, (n, z) in enumerate(_trajectories(self.rollouts)):
            for t in self.rollouts.stop_mask[b].nonzero().flatten().tolist():
                expected, weights = torch.zeros(()), 0.0
                for weight, term in target.terms:
                    assert isinstance(term, LogProb)
                    c = term.context(ROWS[n])
                    ids = [*c.before, *z[:t], stop, *c.after]
                    weights += abs(weight)
                    expected = expected + weight * self.plain.log_prob(ids, len(c.before) - c.before_scored)
                off = max(off, _apart(found[b, t], expected) / weights)
        return off

    def train_mode(self) -> float:
        """Dropout and its like: does log q in train mode differ from that of eval mode?"""
        with torch.no_grad():
            trained, evaluated = (self.policy.train(mode).evaluate(self.rollouts) for mode in (True, False))
        return _apart(trained.final(self.rollouts.lengths), evaluated.final(self.rollouts.lengths))

    def gradient(self) -> float:
        """Of the mean log q by all weights: the distance from the plain gradient, relative to its norm."""
        self.policy.train().zero_grad()
        self.policy.evaluate(self.rollouts).final(self.rollouts.lengths).mean().backward()
        plain = Plain(copy.deepcopy(self.plain.model).requires_grad_(True))
        for n, z in _trajectories(self.rollouts):
            log_pf, log_stop = plain.log_q(self.policy, self.prompts[n], z)
            ((log_pf.sum() + log_stop[-1]) / len(self.rollouts)).backward()
        expected = dict(plain.model.named_parameters())
        distance = size = 0.0
        for name, parameter in self.policy.model.named_parameters():
            a, b = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, expected[name]))
            distance += float((a - b).double().square().sum())
            size += float(b.double().square().sum())
        return math.sqrt(distance / size)

    def lora(self) -> float:
        """The default adapter, which begins as the model itself. One update of it must not move the frozen model."""
        policy = Policy(self.lm, "{x}", SUPPORT).eval()
        off = self._off_log_q(self.rollouts, policy)
        optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
        policy.train().evaluate(self.rollouts).final(self.rollouts.lengths).mean().backward()
        optimizer.step()
        frozen = all(torch.equal(v, self.before[k]) for k, v in self.lm.model.state_dict().items())
        return off if frozen else math.inf

    @property
    def way(self) -> str:
        """How the library goes through this model."""
        sharing = getattr(self.lm, "sharing", None)
        if sharing is None:
            return ""
        if not sharing.steps:
            return "whole texts"
        scored = "scoring" if sharing.spans else "whole texts for scoring"
        return f"shared prompts: sampling, {scored}" + (", packed suffixes" if sharing.packed else "")


def _pick(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """[T] the logits of these tokens, one from each of the first T rows."""
    return logits[torch.arange(len(tokens)), list(tokens)]


def _trajectories(rollouts: Rollouts) -> list[tuple[int, list[int]]]:
    """(row, completion) of each trajectory."""
    return list(zip(rollouts.row_index.tolist(), rollouts.completions(), strict=True))


def _apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference; infinities of the same sign are equal, NaN differs from all."""
    found, expected = found.detach().double(), expected.detach().double()
    off = torch.where(found == expected, 0.0, (found - expected).abs()).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    return float(off.max()) if off.numel() else 0.0


QUANTITIES: dict[str, Callable[[Bench], float]] = {
    "evaluate": Bench.evaluate,
    "sample": Bench.sample,
    **{name: partial(Bench.target, name=name) for name in TARGETS},
    "train": Bench.train_mode,
    "gradient": Bench.gradient,
    "lora": Bench.lora,
}


def measure(case: Case, tokenizer: PreTrainedTokenizerBase) -> Measured:
    """Every quantity of one model. Whatever goes wrong is a cell of the table, not the end of the benchmark."""
    start = time.monotonic()
    made, bench = attempt(lambda: Bench(case.model(), tokenizer, case.name))
    if bench is not None:
        made, off = attempt(bench.causal)
    if bench is None or off is None:
        cells = dict.fromkeys(QUANTITIES, made)
    else:
        cells = {name: cell_of(bench, name, off < TOLERANCE) for name in QUANTITIES}
    way = bench.way if bench is not None else ""
    return Measured(case.name, case.kind, cells, time.monotonic() - start, way)


def cell_of(bench: Bench, name: str, causal: bool) -> Cell:
    cell, off = attempt(lambda: QUANTITIES[name](bench))
    if off is None:
        return cell
    exact = off < (GRADIENT if name == "gradient" else TOLERANCE)
    return Cell("exact" if exact and causal else "wrong", off, "" if causal else "the model is not causal")


T = TypeVar("T")


def attempt(compute: Callable[[], T]) -> tuple[Cell, T | None]:
    try:
        return Cell("exact"), compute()
    except AmortLMError as e:
        return Cell("refused", message=str(e)), None
    except Exception as e:
        return Cell("error", message=f"{type(e).__name__}: {e}".partition("\n")[0]), None


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError in the running code after so many seconds of CPU time, and again every second."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def table(results: Sequence[Measured]) -> str:
    rows = [[r.name, r.outcome, *map(str, r.cells.values())] for r in results]
    return tabulate(rows, ["model", "outcome", *QUANTITIES], disable_numparse=True)


PAGE = """# Models

Is amortlm exact with your model? Look for the `model_type` of its config.json:

{contents}

A name may have variants: windows narrower and wider than the texts, encoders as decoders, rotary embeddings that change
with the length. A model that is not here, or that transformers has changed since: `amortlm doctor MODEL` measures it.
With weights in 4 bits a model is measured anew, too ([large models](scale.md#weights-in-4-bits)).

{tables}

## What was measured

The causal architectures of transformers {version}, tiny random models of each, with dropout on. Measured are log q of
given completions and of samples, targets `{{z}}`, `{{z}} {{y}}` and contrastive at every stopping state, log q in train
mode, the gradient by all weights, and the default LoRA. Exact: within 1e-4 nats (1e-5 of the gradient's norm) of plain
passes of one text at a time, in float32. Refused: an error that says why. Written by
`python -m benchmarks.architectures --markdown docs/models.md`.

Of {kinds} architectures {counts}, {left} not measured. The tables have {cases} variants.

Some models attend only to `index_topk` keys, those with the highest scores of an index (DeepSeek V3.2 and V4,
GLM-MoE-DSA, dots3-note, Hy V4). Which of two equal scores is taken depends on padding, so a longer text can have two
log-probabilities, alone and in a batch. Such texts are refused.

Known deviations: the gradients of Zamba and Zamba2 are up to 2e-5 off in float32 and 1.6e-7 in float64; Reformer gives
gradients only in training mode, and training it is refused.

## Not measured

{unbuilt}
"""
# Title, what it means for the reader, and the columns of its table.
GROUPS = {
    "fast": (
        "Exact, with shared passes",
        "A prompt is encoded once for its samples, and a prefix for what follows it; with packed suffixes, the texts "
        "after `{z}` share a pass, too.",
        ("model", "way through the model"),
    ),
    "whole": (
        "Exact, with whole texts",
        "Each text takes a pass of its own, at least for scoring: the same figures, slower.",
        ("model", "way through the model"),
    ),
    "refused": ("Refused", "An error says why, before anything is computed.", ("model", "why")),
    "other": (
        "Not exact",
        "What is not exact stands first under why; everything else is.",
        ("model", "result", "way through the model", "why"),
    ),
}
COLUMNS = ("model", "result", "way through the model", "why")
Row = tuple[str, str, str, str]


def _narrow(text: str) -> str:
    """A table of Markdown without the spaces that line it up."""
    return re.sub(r"-{4,}", "---", re.sub(r" {2,}", " ", text))


def page(results: Sequence[Measured]) -> str:
    """docs/models.md: the outcome of every case, architectures counted as they are by default."""
    groups = grouped([(r.name, r.outcome, r.way, _reason(r)) for r in results])
    by_kind = Counter(r.outcome for r in results if r.name == r.kind)
    return PAGE.format(
        version=transformers.__version__,
        counts=", ".join(f"{n} {outcome}" for outcome, n in by_kind.most_common()),
        kinds=len(KINDS),
        left=len(KINDS) - by_kind.total(),
        cases=len(results),
        contents=contents(groups),
        tables=tables(groups),
        unbuilt="\n".join(f"- {kind}: {why}" for kind, why in UNBUILT.items()),
    )


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of the page (COLUMNS) by group, in the order of GROUPS, without empty ones."""
    found: dict[str, list[Row]] = {name: [] for name in GROUPS}
    for row in rows:
        _, outcome, way, _ = row
        exact = "whole" if "whole texts" in way else "fast"
        found[exact if outcome == "exact" else "refused" if outcome == "refused" else "other"].append(row)
    return {name: rows for name, rows in found.items() if rows}


def contents(groups: Mapping[str, Sequence[Row]]) -> str:
    """A line for each group, with a link to its table."""
    lines = []
    for name, rows in groups.items():
        title = GROUPS[name][0]
        link = re.sub(r"[^\w ]", "", title.lower()).replace(" ", "-")
        lines.append(f"- [{title}](#{link}): {len(rows)} variants")
    return "\n".join(lines)


def tables(groups: Mapping[str, Sequence[Row]]) -> str:
    parts = []
    for name, rows in groups.items():
        title, text, columns = GROUPS[name]
        shown = [[row[COLUMNS.index(column)] for column in columns] for row in rows]
        parts += [f"## {title}", text, _narrow(tabulate(shown, columns, tablefmt="github"))]
    return "\n\n".join(parts)


def _reason(result: Measured) -> str:
    """What is not exact, and the first message about it."""
    if result.outcome == "exact":
        return ""
    cells = {k: c for k, c in result.cells.items() if c.outcome == result.outcome}
    message = next(iter(cells.values())).message.replace("|", "\\|").partition(";")[0]
    return message if len(cells) == len(result.cells) else f"{', '.join(cells)}: {message}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="NAME",
        help="kinds (mistral) or cases ('mistral, wide window')",
    )
    parser.add_argument("--json", type=Path, help="write every figure and message")
    parser.add_argument("--markdown", type=Path, help="write the page")
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    tokenizer = LanguageModel.from_pretrained("embedded", device="cpu").tokenizer
    chosen = list(cases(args.only))
    results = []
    for i, case in enumerate(chosen, 1):
        with time_limit(SECONDS):
            result = measure(case, tokenizer)
        results.append(result)
        print(f"{i}/{len(chosen)} {result.name}: {result.outcome} ({result.seconds:.1f} s)", flush=True)
        for message in dict.fromkeys(c.message for c in result.cells.values() if c.message):
            print(f"    {message[:200]}")
        if args.json:
            args.json.write_text(json.dumps([asdict(r) | {"outcome": r.outcome} for r in results], indent=1))
    print(table(results))
    print(Counter(r.outcome for r in results), Counter(r.outcome for r in results if r.name == r.kind))
    if args.markdown:
        args.markdown.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
