"""The posterior of a row as a table: its most probable completions with p, q and log R.

If the support can be enumerated, the table is exact. Else n draws of q name the completions, and n other draws measure
what these leave out: with S the completions named and R(S) their total reward, which is known,

    Z = R(S) + E_q[w(z) 1(z not in S)],    w = R / q.

The second term is estimated without bias, because the draws that measure it did not choose S. So only the mass outside
S is uncertain: p(z) = R(z) / Z has the relative standard error of Z, and the masses sum to one. If no draw lies outside
S, that mass is estimated as 0 and its error is unknown (NaN).
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from amortlm.errors import ConfigError, RewardError
from amortlm.inference.correct import Weighted, weigh
from amortlm.inference.exact import LIMIT, enumerate_posterior, policy_log_probs
from amortlm.policy.policy import Policy
from amortlm.targets.base import Target
from amortlm.types import Row, finite

TOP = 20  # completions listed
WIDTH = 60


@dataclass(frozen=True)
class Line:
    """A completion.

    text   as `Posterior.sample` writes it, with the stop symbol, unless that is a special token. With several stop
           symbols without one, since p and q are sums over them
    tokens token ids, without the stop symbol
    p, q   probability under the posterior (see `Table.method`) and under the sampler
    log_r  log R, nats
    """

    text: str
    tokens: list[int]
    p: float
    q: float
    log_r: float


@dataclass(frozen=True)
class Table:
    """The most probable completions of a row, by p. Prints as a table.

    method        "enumeration": p is exact. "draws": p is R / Z with an estimate of Z (module docstring)
    lines         at most `top` of them
    known         number of completions that were scored, listed or not
    p_unlisted    mass of p on all completions that are not listed
    p_error       standard error of p_unlisted; 0 if exact, NaN if unknown
    q_unlisted    mass of q on all completions that are not listed, exact
    log_z         nats; log_z_error: its standard error, which is also the relative one of every p; 0 if exact
    draws         completions drawn, 0 for an enumeration
    """

    method: str
    lines: list[Line]
    known: int
    p_unlisted: float
    p_error: float
    q_unlisted: float
    log_z: float
    log_z_error: float
    draws: int

    def to_dict(self) -> dict[str, Any]:
        return finite(asdict(self))

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            [textwrap.fill(x.text, WIDTH), f"{x.p:.4f}", f"{x.q:.4f}", f"{x.log_r:.3f}"] for x in self.lines
        ]
        rest = ["(all others)", f"{self.p_unlisted:.4f}", f"{self.q_unlisted:.4f}", ""]
        headers, align = ["completion", "p", "q", "log R"], ("left", "right", "right", "right")
        table = tabulate([*rows, rest], headers=headers, disable_numparse=True, colalign=align)
        return f"{table}\n\n{self.legend}"

    @property
    def legend(self) -> str:
        """How p was computed, in a few lines."""
        listed, half = f"{len(self.lines)} of {self.known} completions", self.draws // 2
        if self.method == "enumeration":
            return f"{listed}. p is exact, by enumeration of the support; log Z {self.log_z:.3f}."
        found = f"{listed} that {half} draws of q found; p is R / Z. {half} other draws measure the rest:\n"
        blind = "A mode that q never visits shows in none of this."
        if math.isnan(self.log_z_error):
            return (
                f"{found}none of them is another completion with R > 0. So log Z {self.log_z:.3f} and every p leave "
                f"out a mass\nthat is small where q is near p, but unknown. {blind}"
            )
        return (
            f"{found}log Z {self.log_z:.3f} +- {self.log_z_error:.3f}, so each p is uncertain by "
            f"{100 * self.log_z_error:.1f} %; p of all others {self.p_unlisted:.3f} +- {self.p_error:.3f} (standard "
            f"errors).\n{blind}"
        )


def tabulated(
    policy: Policy, target: Target, row: Row, n: int, *, limit: int = LIMIT, top: int = TOP, seed: object = 0
) -> Table:
    """The table of a row; see `Posterior.table`."""
    if n < 2 or top < 1:
        raise ConfigError(f"a table needs n >= 2 draws and top >= 1 lines, got n={n}, top={top}")
    if policy.support.size() <= limit:
        return _exact(policy, target, row, limit, top)
    return _drawn(policy, target, row, n, top, seed)


def _exact(policy: Policy, target: Target, row: Row, limit: int, top: int) -> Table:
    exact = enumerate_posterior(target, policy.support, row, limit)
    p, q = exact.log_p.exp(), policy_log_probs(policy, row).exp()
    order = p.argsort(descending=True, stable=True)[:top].tolist()
    lines = [
        _line(policy, exact.completions[i], p[i].item(), q[i].item(), exact.log_p[i].item() + exact.log_z)
        for i in order
    ]
    return Table(
        method="enumeration",
        lines=lines,
        known=len(p),
        p_unlisted=_rest([x.p for x in lines]),
        p_error=0.0,
        q_unlisted=_rest([x.q for x in lines]),
        log_z=exact.log_z,
        log_z_error=0.0,
        draws=0,
    )


def _drawn(policy: Policy, target: Target, row: Row, n: int, top: int, seed: object) -> Table:
    named = _distinct(weigh(policy, target, row, n, seed=("table", seed)))
    others = weigh(policy, target, row, n, seed=("table, the rest", seed))
    outside = torch.tensor([tuple(z) not in named for z in others.rollouts.completions()])
    log_r = torch.tensor([r for r, _ in named.values()], dtype=torch.float64)
    log_z, error = total(log_r, others.log_weights.double().masked_fill(~outside, -torch.inf))
    if not math.isfinite(log_z):
        raise RewardError(
            f"all {2 * n} completions drawn have R = 0, so none can be listed; draw more of them (n), train the policy,"
            " or give the constraint a penalty"
        )
    best = sorted(named.items(), key=lambda item: (-item[1][0], item[0]))[:top]
    lines = [_line(policy, list(z), math.exp(r - log_z), math.exp(q), r) for z, (r, q) in best]
    listed = sum(x.p for x in lines)
    return Table(
        method="draws",
        lines=lines,
        known=len(named),
        p_unlisted=_rest([x.p for x in lines]),
        p_error=listed * error,
        q_unlisted=_rest([x.q for x in lines]),
        log_z=log_z,
        log_z_error=error,
        draws=2 * n,
    )


def total(log_r: Tensor, log_w: Tensor) -> tuple[float, float]:
    """(log Z, its standard error) from the known rewards [m] of named completions, and the weights [n] of independent
    draws, -inf for a draw that is named. Nats; float64. The error is NaN if all of these are -inf."""
    shift = torch.cat([log_r, log_w]).max()
    if not torch.isfinite(shift):
        return -math.inf, math.nan
    weights = (log_w - shift).exp()
    z = (log_r - shift).exp().sum() + weights.mean()
    error = (weights.std() / math.sqrt(len(weights)) / z).item()
    return (z.log() + shift).item(), error if weights.any() else math.nan


def _distinct(pool: Weighted) -> dict[tuple[int, ...], tuple[float, float]]:
    """(log R, log q) of each different completion of a pool with R > 0."""
    found = zip(pool.rollouts.completions(), pool.log_reward.tolist(), pool.log_q.tolist(), strict=True)
    return {tuple(z): (r, q) for z, r, q in found if r > -math.inf}


def _line(policy: Policy, tokens: list[int], p: float, q: float, log_r: float) -> Line:
    return Line(_text(policy, tokens), tokens, p, q, log_r)


def _text(policy: Policy, tokens: list[int]) -> str:
    stops = policy.support.stop_ids
    shown = len(stops) == 1 and stops[0] not in policy.lm.special_ids
    return policy.lm.decode([*tokens, stops[0]] if shown else tokens)


def _rest(masses: list[float]) -> float:
    return max(0.0, 1 - math.fsum(masses))
