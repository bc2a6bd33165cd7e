"""What the trainer learns from: it is collected before the loss, and says how it was drawn."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stats import LEVEL, g_test
from torch import Tensor
from trainers import ROWS, make_trainer

from amortlm import LanguageModel, Support, types
from amortlm.engine.decoding import Draws
from amortlm.engine.sampler import Request, Sampler
from amortlm.inference.exact import policy_log_probs
from amortlm.policy.laws import support_completions
from amortlm.seeds import seed_of
from amortlm.support import SupportLaw
from amortlm.train.metrics import Metrics
from amortlm.train.source import Experience


def collected(lm: LanguageModel, folder: Path, behaviour: dict[str, float], **settings: Any) -> Any:
    """(trainer, experience) with two completions of each row in the buffer."""
    settings = {"num_samples": 4, "corrected_particles": 4, "behaviour": behaviour, **settings}
    trainer = make_trainer(lm, folder, gold=[[" a b", " c"]] * len(ROWS), **settings)
    return trainer, trainer._prepare_inputs({"rows": trainer.train_dataset})


def test_the_samplers_log_q_is_kept_and_is_that_of_the_trainer(one_lm: LanguageModel, tmp_path: Path) -> None:
    """Of what is drawn now, tempered or not; not of what comes from the buffer."""
    trainer, found = collected(one_lm, tmp_path, {"tempered": 0.5}, epsilon=0.2)
    log_probs = trainer.policy.evaluate(found.rollouts)
    torch.testing.assert_close(found.log_q, log_probs.final(found.rollouts.lengths), atol=1e-5, rtol=1e-5)
    assert found.version == 0
    _, replayed = collected(one_lm, tmp_path, {"replay": 1.0})
    assert replayed.log_q.view(len(ROWS), 4).isnan().tolist() == [[False, False, True, True]] * len(ROWS)
    order = replayed.rollouts.row_index.tolist()
    assert order == sorted(order)
    fresh = ~replayed.log_q.isnan()
    torch.testing.assert_close(
        replayed.log_q[fresh],
        trainer.policy.evaluate(replayed.rollouts).final(replayed.rollouts.lengths)[fresh],
        atol=1e-5,
        rtol=1e-5,
    )


def test_prior_draws_are_of_the_model_before_training(one_lm: LanguageModel, tmp_path: Path) -> None:
    """Whatever has become of the policy; a false alarm as rare as `stats.LEVEL` says, and the policy as control."""
    settings = {"support": Support(stop=".", max_tokens=1), "num_samples": 2000}
    trainer = make_trainer(one_lm, tmp_path, behaviour={"prior": 1.0}, rows=ROWS[:1], **settings)
    before = policy_log_probs(trainer.policy, ROWS[0]).exp()
    with torch.no_grad():
        for p in trainer.policy.parameters():
            p += 0.05 if p.requires_grad else 0
    after = policy_log_probs(trainer.policy, ROWS[0]).exp()
    found = trainer._prepare_inputs({"rows": trainer.train_dataset})
    assert found.log_q.isnan().all()
    order = {tuple(z): i for i, z in enumerate(support_completions(trainer.policy))}
    drawn = torch.tensor([order[tuple(z)] for z in found.rollouts.completions()])
    counts = torch.bincount(drawn, minlength=len(before))
    assert g_test(counts, before) > LEVEL > g_test(counts, after)


def test_prior_draws_look_ahead(one_lm: LanguageModel, tmp_path: Path) -> None:
    """Of p(token)^(1/temperature) h(after it), by plain passes; a false alarm as rare as `stats.LEVEL` says, and the law
    that does not look ahead as control."""
    support = Support(stop=".", max_tokens=3, allowed_tokens=("a", "t", " cat"), pattern=r"a.*t|t( cat)*")
    settings = {"support": support, "num_samples": 2000}
    source = make_trainer(one_lm, tmp_path, behaviour={"prior": 1.0}, rows=ROWS[:1], **settings).source
    step = (3, 0)
    heat = random.Random(seed_of(("prior", source.config.seed, step))).uniform(1, 2)
    prompt = source.policy.encode_rows(ROWS[:1])[0]
    guide, plain = source._guided, source.policy.support
    every = [z for n in range(1, 4) for z in plain.completions(n)]

    def law(of: SupportLaw) -> Tensor:
        """[M] chances of all completions, at this temperature of p."""
        out = []
        for z in every:
            chance, node = 1.0, torch.tensor([0])
            for t, token in enumerate([*z, plain.stop_ids[0]][:3]):
                logits = one_lm.model(torch.tensor([[*prompt, *z[:t]]])).logits[:, -1] / heat
                chance *= of.step(logits, torch.tensor([t]), node).log_q[0, token].exp().item()
                node = plain.advance(node, torch.tensor([token]))
            out.append(chance)
        return torch.tensor(out)

    drawn = source.collect(ROWS[:1], step).rollouts.completions()
    counts = torch.bincount(torch.tensor([every.index(z) for z in drawn]), minlength=len(every))
    assert law(guide).sum().item() == pytest.approx(1, abs=1e-4)
    assert g_test(counts, law(guide)) > LEVEL > g_test(counts, law(plain))


def test_each_prompt_has_one_behaviour(one_lm: LanguageModel, tmp_path: Path) -> None:
    """Half of the prompts are the prior's; the rest is drawn as it is without a prior."""
    rows = [{"x": "a", "y": f" {a}{b}"} for a in "abcdefgh" for b in "abcdefgh"]
    own, mixed = (
        make_trainer(one_lm, tmp_path, rows=rows, behaviour=mix).source.collect(rows, (0, 0))
        for mix in ({"policy": 1.0}, {"prior": 0.5})
    )
    prior = mixed.log_q.view(len(rows), 4).isnan()
    assert torch.equal(prior.all(1), prior.any(1))
    assert 12 < prior.all(1).sum() < 52, "64 coins: outside once in a million"
    same = [a == b for a, b in zip(own.rollouts.completions(), mixed.rollouts.completions(), strict=True)]
    assert all(torch.tensor(same)[~prior.flatten()])


@pytest.mark.parametrize("objective", ["vargrad", "forward_kl"])
def test_posterior_draws_are_decided_once(one_lm: LanguageModel, tmp_path: Path, objective: str) -> None:
    trainer, found = collected(one_lm, tmp_path, {"corrected": 0.5}, objective=objective)
    assert found.from_posterior.tolist() == [c.corrected for c in trainer.source.choices(ROWS, (0, 0))]
    assert 0 < found.from_posterior.sum() < len(ROWS), "a mix, or nothing is shown"
    given = found.log_q.view(len(ROWS), 4).isnan().sum(1)
    half = 4 if objective == "forward_kl" else 2
    assert given.tolist() == [half if yes else 0 for yes in found.from_posterior.tolist()]
    trainer.source.corrected = lambda *_: pytest.fail("drawn again")  # type: ignore[method-assign]
    loss = trainer.compute_loss(trainer.policy, found)
    other = trainer.compute_loss(trainer.policy, replace(found, from_posterior=~found.from_posterior))
    assert (loss == other) == (objective == "vargrad")


def test_the_loss_only_evaluates(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No draw, no score, no replay: it is a function of the experience."""
    trainer, found = collected(one_lm, tmp_path, {"replay": 0.5, "corrected": 0.25})
    for owner, name in (
        (trainer.policy, "sample"),
        (trainer.training_target, "score"),
        (trainer.buffer, "add"),
        (trainer.buffer, "draw"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(name))
    assert trainer.compute_loss(trainer.policy, found) == trainer.compute_loss(trainer.policy, found)


class Off:
    """A sampler that reports another log q than that of its draws, by so much at each token."""

    reproducible = True

    def __init__(self, sampler: Sampler, by: float):
        self.sampler, self.by = sampler, by

    def sample(self, request: Request) -> Draws:
        draws = self.sampler.sample(request)
        inside = torch.arange(draws.log_pf.shape[1]) < draws.lengths[:, None]
        return replace(draws, log_pf=draws.log_pf + self.by * inside, log_pterm=draws.log_pterm + self.by)


def test_the_log_shows_whether_sampler_and_trainer_agree(one_lm: LanguageModel, tmp_path: Path) -> None:
    settings = {"behaviour": {"tempered": 0.5, "replay": 0.25}, "max_steps": 3}
    trainer = make_trainer(one_lm, tmp_path, **settings)
    trainer.train()
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 3
    assert all(0 <= e["sampler_mismatch"] <= e["sampler_mismatch_max"] < 3e-6 for e in logged)
    wrong = make_trainer(one_lm, tmp_path / "wrong", **settings)
    wrong.policy.sampler = Off(wrong.policy.sampler, 0.1)  # type: ignore[assignment]
    wrong.train()
    logged = [e for e in wrong.state.log_history if "loss" in e]
    assert [e["sampler_mismatch"] for e in logged] == pytest.approx([0.1] * 3, abs=1e-4)
    assert [e["sampler_mismatch_max"] for e in logged] == pytest.approx([0.1] * 3, abs=1e-4)


def test_a_mismatch_is_that_of_fresh_draws(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer, found = collected(one_lm, tmp_path, {"replay": 1.0})
    log_probs = trainer.policy.evaluate(found.rollouts)
    nothing = replace(found, log_q=torch.full_like(found.log_q, torch.nan))
    assert nothing.mismatch(log_probs) == {}
    one: Experience = replace(found, log_q=found.log_q.clone())
    first = int((~found.log_q.isnan()).nonzero()[0])
    one.log_q[first] += 2.0
    count = int((~found.log_q.isnan()).sum())
    per_token = 2.0 / (int(found.rollouts.lengths[first]) + 1)
    expected = {
        "sampler_mismatch": per_token / count,
        "sampler_mismatch_share": 1 / count,
        "sampler_mismatch_max": per_token,
    }
    assert one.mismatch(log_probs) == pytest.approx(expected, abs=1e-5)


def test_figures_of_several_updates_and_processes() -> None:
    """Means, and the highest of what ends in _max; a figure that one process lacks is that of the others."""

    class Two:
        def gather(self, value: Any) -> list[Any]:
            return [value, {"loss": 5.0}]

    metrics = Metrics()
    for value in (1.0, 3.0):
        metrics.add({"loss": value, "off_max": value})
    assert metrics.take(Two()) == {"loss": 3.5, "off_max": 3.0}  # type: ignore[arg-type]
    assert metrics.take(Two()) == {"loss": 5.0}, "taken once"  # type: ignore[arg-type]


def test_the_key_of_a_row_is_computed_once(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often training asks for it: to draw, to replay, to remember rewards and log Z."""
    counted: list[Any] = []
    compute = types._key
    monkeypatch.setattr(types, "_key", lambda row: counted.append(dict(row)) or compute(row))
    settings = {"behaviour": {"replay": 0.4, "corrected": 0.3}, "objective": {"tb": {"log_z": "learned"}}}
    trainer = make_trainer(one_lm, tmp_path, max_steps=6, corrected_particles=4, **settings)
    asked = len(counted)
    trainer._run(None, _no_signal(trainer), {})
    assert asked == len(counted) == len(ROWS)
    assert types.row_key(ROWS[0]) == types.row_key(trainer.train_dataset[0])
    assert len(counted) == len(ROWS) + 1, "the control: a plain row is counted"


def _no_signal(trainer: Any) -> Any:
    from amortlm.train.interruption import Interruption

    return Interruption(trainer.args)
