"""Draws to hold a sampler against: right where they are trusted, and not trusted where they may be wrong."""

from __future__ import annotations

import math

import pytest
import torch
from reference import tiny_policy
from stats import LEVEL, g_test
from tilted import ROW, SUPPORT, Tilted, blind, off, perfect
from torch import Tensor
from torch.nn import functional as F

from amortlm import LanguageModel, Policy, Posterior, Support, constraint, narrow
from amortlm.diagnostics.diagnose import CORRECT, TRUST
from amortlm.errors import ConfigError, DataError
from amortlm.inference import pool
from amortlm.inference import truth as module
from amortlm.inference.exact import enumerate_posterior
from amortlm.inference.truth import Truth, posterior_draws
from amortlm.types import Rollouts

DRAWS = 200


def draws(posterior: Posterior, n: int = DRAWS, **options: object) -> Truth:
    assert posterior.target is not None
    return posterior_draws(posterior.policy, posterior.target, ROW, n, **{"seed": 0, **options})  # type: ignore[arg-type]


def counts_and_law(posterior: Posterior, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """How often each completion was drawn, and its exact posterior probability."""
    assert posterior.target is not None
    exact = enumerate_posterior(posterior.target, posterior.policy.support, ROW)
    place = {tuple(z): i for i, z in enumerate(exact.completions)}
    index = torch.tensor([place[tuple(z)] for z in rollouts.completions()])
    return torch.bincount(index, minlength=len(place)), exact.log_p.exp()


def fits(posterior: Posterior, rollouts: Rollouts | None) -> float:
    assert rollouts is not None
    return g_test(*counts_and_law(posterior, rollouts))


@pytest.mark.parametrize(("limit", "source"), [(84, "enumeration"), (83, "sir")])
def test_draws_are_those_of_the_posterior(one_lm: LanguageModel, limit: int, source: str) -> None:
    posterior = off(one_lm, 1.2)
    found = draws(posterior, 2500, limit=limit)
    assert (found.source, found.label, found.trusted) == (source, source, True)
    assert found.rollouts is not None
    assert len(found.rollouts) == len(found.log_w) > 400
    assert fits(posterior, found.rollouts) > LEVEL
    assert (found.exact is not None) == (source == "enumeration")
    log_q = posterior.policy.evaluate(found.rollouts).final(found.rollouts.lengths)
    assert found.log_q == pytest.approx(log_q.detach().double(), abs=1e-4)
    log_r = posterior.target.score_final(found.rollouts)  # type: ignore[union-attr]
    assert found.log_reward == pytest.approx(log_r.double(), abs=1e-4)
    # The control: draws of q, of which there are as many, are not of the posterior.
    assert fits(posterior, posterior.policy.sample([ROW], len(found.log_w))[0]) < LEVEL


def test_one_draw_of_each_group_by_weight() -> None:
    """Law and independence: no position is drawn twice, and a group without R > 0 gives nothing."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    groups = weights.log().expand(4000, 4)
    index = pool.one_of_each(groups, torch.Generator().manual_seed(0))
    assert torch.equal(index // 4, torch.arange(4000))
    counts = torch.bincount(index % 4, minlength=4)
    assert g_test(counts, weights) > LEVEL
    assert g_test(counts, torch.ones(4)) < LEVEL
    some = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf], [-math.inf, 1.0]])
    assert pool.one_of_each(some, torch.Generator()).tolist() == [2, 5]


def test_groups_grow_with_the_distance(one_lm: LanguageModel) -> None:
    """Fewer draws where each needs more of the pool, and a margin that says what bias is left."""
    good, near, far = (draws(p, limit=0) for p in (perfect(one_lm), off(one_lm, 0.8), off(one_lm, 1.5)))
    assert good.ess > near.ess > far.ess
    assert 0 < good.margin < math.log1p(2 * module.BIAS) + 1e-9, "the frozen model is another proposal"
    assert far.margin <= math.log1p(2 * module.BIAS) + 1e-9
    assert DRAWS >= len(good.log_w) > len(near.log_w) >= module.ENOUGH
    # Of four times the pool, since the first had too few for `far`.
    assert len(far.log_w) / 4 < len(near.log_w)


def test_chains_that_agree_are_trusted(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "KHAT", -math.inf)  # weights may not be used
    monkeypatch.setattr(pool, "REPEATS", math.inf)
    posterior = off(one_lm, 0.4)
    found = [draws(posterior, 32, limit=0, seed=s) for s in range(2)]
    assert [f.label for f in found] == ["mcmc"] * 2
    assert all(f.rhat < module.RHAT for f in found)
    together = Rollouts.cat([f.rollouts for f in found if f.rollouts is not None])
    assert len(together) == 2 * module.CHAINS
    assert fits(posterior, together) > LEVEL
    assert not torch.equal(found[0].log_w, found[1].log_w)


def test_a_mode_that_q_misses_is_caught_by_gold(one_lm: LanguageModel) -> None:
    """Chains that start in it stay there, those of q never come: they do not agree. Without gold nothing can tell."""
    posterior, missed = blind(one_lm)
    caught = draws(posterior, 64, limit=0, gold=[missed])
    assert (caught.source, caught.trusted) == ("mcmc", False)
    assert caught.label == "mcmc (not converged)"
    unseen = draws(posterior, 64, limit=0)
    assert unseen.trusted, "the control: q's own draws look perfect"
    everyday = posterior.policy.sample([ROW], 4)[0].completions()
    assert draws(posterior, 64, limit=0, gold=everyday).source == "sir", "gold that q knows changes nothing"


def test_a_mode_that_only_the_frozen_model_reaches_is_caught(one_lm: LanguageModel) -> None:
    """q is the frozen model, and the posterior; then it loses its likeliest first token."""
    policy = Policy(one_lm, "{x}", SUPPORT, 2)
    posterior = Posterior(policy, Tilted(policy.prior, lambda z: 0.0))
    assert posterior.diagnose(ROW, limit=0, chains=False).verdict == TRUST
    first = [z[0] for z in policy.sample([ROW], 400)[0].completions()]
    lost = max(set(first), key=first.count)
    assert first.count(lost) > 120
    head = policy.model.get_output_embeddings()
    head.register_forward_hook(
        lambda module, given, logits: logits - 20.0 * F.one_hot(torch.tensor(lost), 48)
    )
    assert all(lost not in z for z in policy.sample([ROW], 400)[0].completions())
    assert any(lost in z for z in policy.prior.sample([ROW], 400)[0].completions())
    found = posterior.diagnose(ROW, limit=0, chains=False)
    assert found.verdict not in (TRUST, CORRECT)
    assert found.importance.ess > 0.5, "the control: little in q's own weights tells"


def test_r_hat_of_stuck_chains() -> None:
    halves = torch.arange(8.0)[:, None].expand(8, 8) % 2
    assert module._rhat(halves) == math.inf
    assert module._rhat(torch.ones(8, 8)) == 1.0
    assert module._rhat(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))) < module.RHAT
    drifting = (
        torch.randn(32, 8, generator=torch.Generator().manual_seed(0)) + 3 * halves[:1].T.repeat(32, 1)[:32]
    )
    drifting[:16] += 2.0
    assert module._rhat(drifting) > module.RHAT
    assert module._rhat(torch.full((4, 4), -math.inf)) == math.inf


def test_nothing_found_is_not_trusted(one_lm: LanguageModel) -> None:
    """A constraint that no draw meets: no draws of the posterior, and no claim."""
    rare = constraint.predicate(lambda text: False)
    posterior = perfect(one_lm)
    assert posterior.target is not None
    found = posterior_draws(
        posterior.policy, (posterior.target + rare).bind(one_lm), ROW, 16, seed=0, limit=0
    )
    assert not found.trusted
    assert "not converged" in found.label


def test_tools_have_no_chains(one_lm: LanguageModel) -> None:
    support = Support(stop=".", min_tokens=1, max_tokens=6, tool="calculator")
    policy = tiny_policy(one_lm, "{x}", support)
    target = one_lm.log_prob("{z} cat", given="the dog ran")
    found = posterior_draws(policy, target, ROW, 32, seed=0, limit=0)
    assert (found.source, found.label, found.trusted) in [("sir", "sir", True), ("none", "none", False)]
    far = posterior_draws(policy, 9.0 * target, ROW, 32, seed=0, limit=0)
    assert (found.rollouts is None) == (not found.trusted)
    assert (far.label, far.rollouts) == ("none", None)


def test_bad_input(one_lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="n must be at least 1"):
        draws(perfect(one_lm), 0)
    with pytest.raises(DataError, match="outside the support"):
        draws(perfect(one_lm), 8, limit=0, gold=[" ran"])


def test_the_frozen_model_looks_ahead(embedded: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither q nor the masked model can be resampled; the draws are those of the posterior, with a false alarm as
    rare as `stats.LEVEL` says."""
    target = embedded.log_prob("{z}", given="{x}") + constraint.contains("brave")
    words = (
        " little",
        " big",
        " brave",
        " young",
        " happy",
        " girl",
        " boy",
        " man",
        " bird",
        " and",
        " named",
    )
    support, _ = narrow(Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=words), target, embedded)
    row, policy = {"x": "Once upon a time there was a"}, Policy(embedded, "{x}", support)
    truth = enumerate_posterior(target.bind(embedded), policy.support, row)
    found = posterior_draws(policy, target, row, 256, seed=0, limit=0, chains=False)
    assert found.source == "sir"
    assert found.rollouts is not None
    order = {tuple(z): i for i, z in enumerate(truth.completions)}
    drawn = torch.tensor([order[tuple(z)] for z in found.rollouts.completions()])
    assert g_test(torch.bincount(drawn, minlength=len(order)), truth.log_p.exp()) > LEVEL
    monkeypatch.setattr(module, "guided", lambda policy, rows, seed: policy.prior)
    assert not posterior_draws(policy, target, row, 256, seed=0, limit=0, chains=False).trusted
