"""EM: the M-step's gradient is that of log p(y | x), and rounds raise it, both by enumeration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from reference import tiny_policy

from amortlm import EM, GFNConfig, LanguageModel, Lookup, MStep, Support
from amortlm import em as em_module
from amortlm.em import joint_log_prob, posterior_weights
from amortlm.engine.adapter import trainable_copy
from amortlm.engine.passes import Passes
from amortlm.errors import CheckpointError, ConfigError
from amortlm.inference.exact import enumerate_posterior

SUPPORT = Support(stop=".", min_tokens=1, max_tokens=2, allowed_tokens=(" a", " cat", "s", " dog"))
ROWS = [{"x": "the cat", "y": "a dog ran"}, {"x": "a", "y": "the cat ran"}]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def log_evidence(lm: LanguageModel) -> float:
    """sum over rows of log p(y | x), z summed out exactly."""
    target = lm.log_prob("{z} {y}", given="{x}")
    return sum(enumerate_posterior(target, SUPPORT.bind(lm), row).log_z for row in ROWS)


def em(lm: LanguageModel, folder: Path, **settings: object) -> EM:
    args = GFNConfig(
        output_dir=str(folder),
        objective="vargrad",
        max_steps=40,
        num_samples=16,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        diagnose_steps=0,
        logging_steps=50,
        save_strategy="no",
    )
    m_step = MStep(steps=25, learning_rate=5e-3, batch_size=2, num_samples=16)
    return EM(
        lm,
        target=lm.log_prob("{z} {y}", given="{x}"),
        prompt="{x} {y}",
        support=SUPPORT,
        train_dataset=ROWS,
        args=args,
        **{"m_step": m_step, "rounds": 2, "adapter": LORA, "p_adapter": LORA, **settings},  # type: ignore[arg-type]
    )


def test_joint_equals_the_target(family_lm: LanguageModel) -> None:
    policy = tiny_policy(family_lm, "{x}", SUPPORT)
    rollouts, _ = policy.sample(ROWS, 5)
    target = family_lm.log_prob("{z} {y}", given="{x}")
    by_target = target.score_final(rollouts)
    torch.testing.assert_close(
        joint_log_prob(family_lm.passes, target, rollouts), by_target, atol=1e-3, rtol=0
    )


def test_joint_with_a_tool_equals_the_target(one_lm: LanguageModel) -> None:
    support = Support(
        stop=".",
        max_tokens=4,
        allowed_tokens=(" a", " cat", ":"),
        tool=Lookup({"cat": "dog ran"}, trigger=":"),
    )
    policy = tiny_policy(one_lm, "{x}", support)
    rollouts = policy.rollouts(ROWS[:1], [[" cat: dog ran", " a cat"]])
    target = one_lm.log_prob("{z} {y}", given="{x}")
    joint = joint_log_prob(one_lm.passes, target, rollouts)
    torch.testing.assert_close(joint, target.score_final(rollouts), atol=1e-3, rtol=0)


def test_m_step_gradient_is_that_of_the_evidence(one_lm: LanguageModel) -> None:
    """Fisher's identity, with every z enumerated: weights from any q then are the exact posterior."""
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    target = one_lm.log_prob("{z} {y}", given="{x}")
    posterior = enumerate_posterior(target, policy.support, ROWS[0])
    rollouts = policy.rollouts(ROWS[:1], [posterior.completions])
    model = trainable_copy(one_lm, LORA)
    trained = [p for n, p in model.named_parameters() if "lora_B" in n]

    log_p = joint_log_prob(Passes(model, one_lm.sharing), target, rollouts)
    evidence = torch.autograd.grad(log_p.logsumexp(0), trained, retain_graph=True)
    same = torch.zeros(len(rollouts), dtype=torch.long)
    weight = posterior_weights(log_p.detach(), torch.zeros(len(rollouts)), same)
    m_step = torch.autograd.grad((weight * log_p).sum(), trained, retain_graph=True)
    plain = torch.autograd.grad(log_p.mean(), trained)
    torch.testing.assert_close(m_step, evidence, atol=1e-4, rtol=1e-3)
    # Control: without weights it is another direction.
    gap = max((a - b).abs().max().item() for a, b in zip(plain, evidence, strict=True))
    assert gap > 0.05 * max(g.abs().max().item() for g in evidence)


@pytest.mark.slow
def test_rounds_raise_the_evidence_and_resume(one_lm: LanguageModel, tmp_path: Path) -> None:
    before = log_evidence(one_lm)
    first = em(one_lm, tmp_path, rounds=1)
    first.run()
    after_one = log_evidence(first.model)
    assert after_one > before + 1
    assert log_evidence(one_lm) == pytest.approx(before), "the frozen model has changed"

    # The second run finds round 0 finished, and goes on from it.
    stamp = (tmp_path / "round-0" / "m_step.json").stat().st_mtime_ns
    second = em(one_lm, tmp_path)
    posterior = second.run()
    assert (tmp_path / "round-0" / "m_step.json").stat().st_mtime_ns == stamp
    assert log_evidence(second.model) > after_one
    # What comes back samples the fitted model's posterior, not the frozen one's.
    assert posterior.diagnose(ROWS).mean("total_variation") < 0.5
    # Loading a finished run gives the same model.
    again = em(one_lm, tmp_path)
    again.run()
    assert log_evidence(again.model) == pytest.approx(log_evidence(second.model), abs=1e-4)


@pytest.mark.parametrize("rounds", [1, 2])
def test_an_m_step_that_was_cut_short_leaves_nothing_behind(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    """Run again, the same object fits the same p as without the interruption, in the first round and in the second."""
    short = {"rounds": rounds, "m_step": MStep(steps=4, learning_rate=5e-3, batch_size=2, num_samples=4)}
    runs = []
    for name in ("smooth", "broken"):
        torch.manual_seed(0)  # adapters start at random
        runs.append(em(one_lm, tmp_path / name, **short))
        runs[-1].args.max_steps = 3
    smooth, broken = runs
    smooth.run()
    calls, true = [], em_module.joint_log_prob

    def breaks(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4 * rounds - 1:
            raise KeyboardInterrupt
        return true(*args)

    monkeypatch.setattr(em_module, "joint_log_prob", breaks)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    broken.run()
    assert log_evidence(broken.model) == pytest.approx(log_evidence(smooth.model), abs=1e-5)


def test_rounds_of_another_run_are_not_taken(one_lm: LanguageModel, tmp_path: Path) -> None:
    short = {"rounds": 1, "m_step": MStep(steps=1, batch_size=2, num_samples=4)}

    def run(**changes: object) -> None:
        again = em(one_lm, tmp_path, **{**short, **changes})
        again.args.max_steps = 2
        again.run()

    run()
    run(rounds=2)
    with pytest.raises(CheckpointError, match="m_step.steps was 1, is 2"):
        run(m_step=MStep(steps=2, batch_size=2, num_samples=4))
    with pytest.raises(CheckpointError, match="max_steps was 2, is 40"):
        em(one_lm, tmp_path, **short).run()


def test_errors_name_the_remedy(one_lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one log_prob"):
        em(one_lm, tmp_path).__class__(
            one_lm,
            target=one_lm.log_prob("{z}") + one_lm.log_prob("{z} {y}"),
            prompt="{x}",
            support=SUPPORT,
            train_dataset=ROWS,
            args=GFNConfig(output_dir=str(tmp_path)),
        )
    with pytest.raises(ConfigError, match="rounds"):
        em(one_lm, tmp_path, rounds=0)
    with pytest.raises(ConfigError, match="full copy"):
        em(one_lm, tmp_path, adapter="full")
