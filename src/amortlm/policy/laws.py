"""Laws of policies and samplers, as assertions for your own: `check_policy`, `check_sampler`."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amortlm.engine.decoding import Draws, Exploration
from amortlm.engine.exactness import Check, Finding
from amortlm.engine.model import CausalLM
from amortlm.engine.sampler import LocalSampler, Request, Sampler
from amortlm.policy.policy import Policy
from amortlm.seeds import seed_of
from amortlm.support import Support
from amortlm.types import PolicyLogProbs, Rollouts, Row

MAX_SUPPORT = 20_000


def check_policy(
    policy: Policy, rows: Sequence[Row], atol: float = 1e-4, num_samples: int = 8, seed: object = 0
) -> None:
    """Assert that `policy` is one distribution per row, the same in `sample` and in `evaluate`.

    1. Sum: over a support of at most `MAX_SUPPORT` completions, q(z) sums to one for each row (within `atol`).
    2. Agreement: the log-probabilities that `sample` returns are those of `evaluate` (within `atol` nats).
    3. Batches: a row gets the same completions and log q alone as in a batch with other rows.

    Raises AssertionError, which names row and completion.
    """
    if policy.support.size() <= MAX_SUPPORT:
        check_sum(policy, rows, atol)
    rollouts, sampled = policy.sample(rows, num_samples, seed=seed)
    with torch.no_grad():
        evaluated = policy.evaluate(rollouts)
    _assert_same(rollouts, "evaluate() and sample() differ", evaluated, sampled, atol)
    for n, row in enumerate(rows):
        mine = (rollouts.row_index == n).nonzero().squeeze(1)
        part = rollouts.select(mine)
        alone, _ = policy.sample([row], num_samples, seed=seed)
        if alone.completions() != part.completions():
            raise AssertionError(
                f"row {n}: sample() draws other completions when the row is alone in the batch"
            )
        with torch.no_grad():
            log_probs = policy.evaluate(alone)
        width = part.tokens.shape[1]
        batch = PolicyLogProbs(evaluated.log_pf[mine, :width], evaluated.log_pterm[mine, : width + 1])
        _assert_same(part, f"row {n}: alone and in a batch evaluate() differs", batch, log_probs, atol)


def check_sum(policy: Policy, rows: Sequence[Row], atol: float = 1e-4) -> None:
    """Assert that q sums to one for each row, by enumeration of the whole support."""
    completions = support_completions(policy)
    for n, row in enumerate(rows):
        rollouts = policy.rollouts([row], [completions])
        with torch.no_grad():
            log_q = policy.evaluate(rollouts).final(rollouts.lengths)
        total = log_q.double().exp().sum().item()
        if not abs(total - 1) <= atol:
            raise AssertionError(
                f"row {n}: q sums to {total:.6f} over the {len(completions)} completions, not to 1"
            )


def check_sampler(
    sampler: Sampler,
    policy: Policy,
    row: Row,
    *,
    num_samples: int = 2000,
    atol: float = 1e-4,
    level: float = 1e-6,
    seed: object = 0,
) -> None:
    """Assert that a sampler draws from `policy`'s q of a row, and reports its draws correctly.

    1. log q: the sampler's log q of each draw equals that of `policy.evaluate` (within `atol` nats), with and without
       exploration.
    2. Frequencies: they are those of q, by a G-test with false-alarm rate `level`, if the support has at most
       `MAX_SUPPORT` completions.
    3. Kept tokens are at the beginning of the draws; at temperature 0 all draws are equal.
    4. Versions: after `load`, draws have the new version, and come from the new weights.
    5. A sampler with `reproducible` draws the same for a prompt alone and together with another prompt.

    At the end policy and sampler have the policy's original weights. Raises AssertionError naming the difference.
    """
    check = _SamplerCheck(sampler, policy, row, atol, seed)
    check.log_q(num_samples, Exploration(torch.linspace(0.5, 2.0, num_samples), epsilon=0.1))
    draws = check.log_q(num_samples, None)
    if policy.support.size() <= MAX_SUPPORT:
        check.frequencies(draws, level)
    check.kept_tokens(draws)
    check.versions()
    if sampler.reproducible:
        check.reproducible()


class _SamplerCheck:
    def __init__(self, sampler: Sampler, policy: Policy, row: Row, atol: float, seed: object):
        self.sampler, self.policy, self.row, self.atol = sampler, policy, row, atol
        self.prompt, self.seed = policy.encode_rows([row])[0], seed_of(seed)

    def request(self, n: int, exploration: Exploration | None = None, **more: Any) -> Request:
        return Request([self.prompt], [n], [self.seed], self.policy.support, exploration, **more)

    def log_q(self, n: int, exploration: Exploration | None) -> Draws:
        draws = self.sampler.sample(self.request(n, exploration))
        if len(draws) != n:
            raise AssertionError(f"{len(draws)} draws instead of {n}")
        support, zero = self.policy.support, torch.zeros(n, dtype=torch.long)
        rollouts = support.rollouts(
            [self.row], zero, draws.tokens.cpu(), draws.lengths.cpu(), draws.stops.cpu()
        )
        for z in {tuple(z) for z in rollouts.completions()}:
            if not support.contains(z):
                raise AssertionError(f"the sampler drew {list(z)}, which is outside the support")
        with torch.no_grad():
            expected = self.policy.evaluate(rollouts.to(self.policy.device))
        said = PolicyLogProbs(draws.log_pf.cpu(), draws.log_pterm.cpu())
        theirs = PolicyLogProbs(expected.log_pf.cpu(), expected.log_pterm.cpu())
        _assert_same(rollouts, "evaluate() and the sampler differ", theirs, said, self.atol)
        return draws

    def frequencies(self, draws: Draws, level: float) -> None:
        """G-test; completions expected fewer than 5 times count as one."""
        completions = [tuple(z) for z in support_completions(self.policy)]
        rollouts = self.policy.rollouts([self.row], [[list(z) for z in completions]])
        with torch.no_grad():
            log_q = self.policy.evaluate(rollouts).final(rollouts.lengths)
        expected = log_q.double().exp().cpu() * len(draws)
        seen = Counter(
            tuple(z[:n]) for z, n in zip(draws.tokens.tolist(), draws.lengths.tolist(), strict=True)
        )
        found = torch.tensor([seen[z] for z in completions], dtype=torch.float64)
        common = expected >= 5
        if not common.all():
            expected = torch.cat([expected[common], expected[~common].sum()[None]])
            found = torch.cat([found[common], found[~common].sum()[None]])
        g = 2 * torch.where(found > 0, found * (found / expected).log(), 0.0).sum()
        half_degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
        p_value = torch.special.gammaincc(half_degrees, g / 2).item() if len(expected) > 1 else 1.0
        if p_value < level:
            raise AssertionError(
                f"the frequencies of {len(draws)} draws differ from q: G-test, p = {p_value:.2g} < {level:g}"
            )

    def kept_tokens(self, draws: Draws) -> None:
        longest = draws.tokens[draws.lengths.argmax(), : int(draws.lengths.max())].tolist()
        begun = longest[: len(longest) // 2]
        if self.policy.support.tool is None:
            rest = self.sampler.sample(self.request(8, kept=[begun] * 8))
            if any(z[: len(begun)] != begun for z in rest.tokens.tolist()):
                raise AssertionError(f"draws do not begin with the kept tokens {begun}")
        greedy = self.sampler.sample(self.request(8, Exploration(torch.zeros(8))))
        if len({(*z, s) for z, s in zip(greedy.tokens.tolist(), greedy.stops.tolist(), strict=True)}) > 1:
            raise AssertionError("draws at temperature 0 differ")

    def versions(self) -> None:
        policy, generator = self.policy, torch.Generator().manual_seed(0)
        before = policy.weights()
        moved = {
            name: w + 0.1 * torch.randn(w.shape, generator=generator).to(w) for name, w in before.items()
        }
        mine = LocalSampler(policy.model, policy.sharing)  # loads weights into the policy itself
        try:
            for version, weights in ((1, moved), (2, before)):
                mine.load(weights, version)
                self.sampler.load(weights, version)
                draws = self.log_q(8, None)
                if draws.version != version:
                    raise AssertionError(f"after load(.., {version}) draws have version {draws.version}")
        finally:
            mine.load(before, 0)

    def reproducible(self) -> None:
        alone = self.sampler.sample(self.request(4))
        longer = [*self.prompt, self.prompt[-1]]
        both = self.sampler.sample(
            Request([longer, self.prompt], [3, 4], [self.seed + 1, self.seed], self.policy.support)
        )
        for i in range(4):
            n = int(alone.lengths[i])
            same = int(both.lengths[3 + i]) == n and torch.equal(both.tokens[3 + i, :n], alone.tokens[i, :n])
            if not same:
                raise AssertionError("a prompt gets different draws alone and together with another prompt")


def support_completions(policy: Policy) -> list[list[int]]:
    """Every completion of the policy's support, as token lists."""
    support = policy.support
    lengths = range(support.min_tokens, support.max_tokens + 1)
    return [z for length in lengths for z in support.completions(length)]


def _assert_same(
    rollouts: Rollouts, law: str, expected: PolicyLogProbs, got: PolicyLogProbs, atol: float
) -> None:
    where: tuple[tuple[str, Tensor, Tensor, Tensor], ...] = (
        ("token", rollouts.action_mask, expected.log_pf, got.log_pf),
        ("stop at state", rollouts.stop_mask, expected.log_pterm, got.log_pterm),
    )
    for what, mask, a, b in where:
        near = (a == b) | ((a - b).abs() <= atol)
        for i, t in (mask & ~near).nonzero().tolist():
            raise AssertionError(
                f"{law}: trajectory {i} {rollouts.completions()[i]}, log q of {what} {t} is {a[i, t].item():.6g} and "
                f"{b[i, t].item():.6g} (allowed: {atol:g} nats)"
            )


@dataclass(frozen=True)
class Sampling:
    """Does sampling equal scoring? findings: the sampler's log q of each token against two ways of scoring it.

    draws: number of completions, of at most `tokens` tokens."""

    findings: tuple[Finding, ...]
    draws: int
    tokens: int

    @property
    def holds(self) -> bool:
        return all(f.exact for f in self.findings)

    @property
    def error(self) -> float:
        """The largest difference of the log q of a token, nats."""
        return max(math.inf if f.error is None else f.error for f in self.findings)

    def __str__(self) -> str:
        seen = f"{self.draws} completions of up to {self.tokens} tokens"
        seen += f", largest difference {self.error:.1e} nats a token"
        if self.holds:
            return f"sampling equals scoring ({seen})"
        return f"sampling does not equal scoring ({seen}): do not trust results with this model; try dtype float32"


@torch.no_grad()
def examine_sampling(lm: CausalLM, seconds: float = 5.0, seed: object = 0) -> Sampling:
    """Draws completions with an adapter of random weights, and compares the sampler's log q of each token with
    `evaluate` and with plain uncached passes of each text alone. seconds: about how long it may take.

    Raises ModelError for a model that is not causal."""
    check = Check(lm.model, lm.name)
    check.alone(check.texts[0])  # the first pass is slower
    start = time.perf_counter()
    check.alone(check.texts[0])
    tokens, draws = affordable(time.perf_counter() - start, seconds)
    policy = Policy(lm, "{x}", Support(stop=check.texts[0][0], max_tokens=tokens))
    _shake(policy)
    rollouts, said = policy.sample(ROWS, draws, seed=seed)
    wanted = {
        "log q of the sampler and of evaluate": policy.evaluate(rollouts),
        "log q of the sampler and of plain uncached passes": _plainly(policy, rollouts),
    }
    findings = []
    for what, scored in wanted.items():
        error = _difference(rollouts, said, scored)
        findings.append(Finding(what, error, error <= check.tolerance))
    return Sampling(tuple(findings), len(rollouts), tokens)


ROWS = ({"x": "a"}, {"x": "One day, somebody asked a question"})


def affordable(pass_seconds: float, seconds: float) -> tuple[int, int]:
    """(tokens, draws for each of ROWS) for a check of about so many seconds: at worst, each token drawn is a pass."""
    passes = seconds / max(pass_seconds, 1e-6) / len(ROWS)
    tokens = min(8, max(1, int(passes) - 2))
    return tokens, min(8, max(1, int(passes / (tokens + 2))))


def _shake(policy: Policy) -> None:
    """Give the adapter random weights, so that it changes q."""
    generator = torch.Generator().manual_seed(0)
    for p in policy.model.parameters():
        if p.requires_grad:
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))


def _plainly(policy: Policy, rollouts: Rollouts) -> PolicyLogProbs:
    """log q of rollouts by one plain pass of each text alone, without mask, cache or padding."""
    prompts, support = policy.encode_rows(rollouts.rows), policy.support
    plain = Check(policy.model, policy.lm.name)
    log_pf = torch.zeros(rollouts.tokens.shape)
    log_pterm = torch.zeros(rollouts.stop_mask.shape)
    for i, z in enumerate(rollouts.completions()):
        prompt = prompts[int(rollouts.row_index[i])]
        logits = plain.alone([*prompt, *z])[None, len(prompt) - 1 :]
        pf, pterm = support.log_probs(
            logits[:, : support.max_tokens], torch.tensor([z], device=policy.device)
        )
        log_pf[i, : len(z)], log_pterm[i, : pterm.shape[1]] = pf[0].cpu(), pterm[0].cpu()
    return PolicyLogProbs(log_pf, log_pterm)


def _difference(rollouts: Rollouts, a: PolicyLogProbs, b: PolicyLogProbs) -> float:
    """The largest difference of two log q of the tokens written and of the stops, nats; inf for NaN."""
    pairs = ((rollouts.action_mask, a.log_pf, b.log_pf), (rollouts.stop_mask, a.log_pterm, b.log_pterm))
    largest = 0.0
    for mask, x, y in pairs:
        x, y, mask = x.cpu(), y.cpu(), mask.cpu()
        apart = torch.where(x == y, 0.0, (x - y).abs())[mask].nan_to_num(torch.inf, torch.inf)
        largest = max([largest, *apart.tolist()])
    return largest


@torch.no_grad()
def examine_policy(lm: CausalLM) -> tuple[Finding, ...]:
    """Tests that creating a policy with the default adapter does not change p, and that q is the same in training and
    evaluation mode.

    Raises ModelError, and errors of peft for a model that it cannot adapt.
    """
    check = Check(lm.model, lm.name)
    before = check.alone(check.texts[0])
    policy = Policy(lm, "", Support(stop=check.texts[0][0], max_tokens=4))
    pairs = {
        "p after a policy is made": (check.alone(check.texts[0]), before),
        "q in training mode, untrained": (
            Check(policy.train().model, lm.name).alone(check.texts[0]),
            before,
        ),
    }
    errors = {what: (a - b).abs().nan_to_num().max().item() for what, (a, b) in pairs.items()}
    return tuple(Finding(what, error, error <= check.tolerance) for what, error in errors.items())
