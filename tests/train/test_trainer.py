"""GFNTrainer on tiny models: what an update does, exact resume, and errors that name the remedy."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import ROWS, EmptyBuffer, losses, make_trainer, weights

from amortlm import GFNConfig, LanguageModel, Support, verifier
from amortlm import constraint as c
from amortlm.engine.adapter import default_lora
from amortlm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PromptTooLongError,
    RewardError,
    TrainingError,
)
from amortlm.objectives import log_weights
from amortlm.targets.base import Target

LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "subtb"},
        {"objective": {"subtb": {"lam": 0.9, "states": 2}}},
        pytest.param({"objective": "db"}, marks=LONG),
        {"objective": {"tb": {"log_z": "learned", "log_z_learning_rate": 0.5}}},
        pytest.param({"objective": "tb"}, marks=LONG),
        pytest.param({"objective": "prefix_tb"}, marks=pytest.mark.slow),
        pytest.param(
            {"objective": {"prefix_tb": {"log_z": "learned", "log_z_learning_rate": 0.5, "states": 2}}},
            marks=LONG,
        ),
        {"objective": "vargrad"},
        pytest.param({"objective": {"vargrad": {"huber": 2.0}}}, marks=pytest.mark.slow),
        pytest.param({"objective": "alpha"}, marks=pytest.mark.slow),
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_every_objective_nears_the_exact_posterior(
    one_lm: LanguageModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """258 completions, so the total variation to the posterior is exact: from above 0.5 to below 0.1."""
    words = Support(
        stop=".", min_tokens=1, max_tokens=3, allowed_tokens=[" a", " the", " cat", " dog", " ran", "b"]
    )
    target = one_lm.log_prob("{z}{y}", given="{x}") * 2.0
    trainer = make_trainer(
        one_lm,
        tmp_path,
        target=target,
        support=words,
        rows=ROWS[:2],
        max_steps=80,
        num_samples=32,
        warmup_steps=5,
        epsilon=0.1,
        **settings,
    )

    def distance() -> float:
        return trainer.posterior.diagnose(ROWS[:2], 32).mean("total_variation")

    before = distance()
    trainer.train()
    after = distance()
    assert before > 0.5
    assert after < 0.1


def test_the_frozen_model_is_untouched(one_lm: LanguageModel, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in one_lm.model.state_dict().items()}
    modules = [name for name, _ in one_lm.model.named_modules()]
    for adapter in (default_lora(4), "full"):
        trainer = make_trainer(one_lm, tmp_path, adapter=adapter)
        start = weights(trainer).clone()
        trainer.train(overwrite_output_dir=True)
        assert not torch.equal(start, weights(trainer))
    assert [name for name, _ in one_lm.model.named_modules()] == modules
    assert all(torch.equal(v, before[k]) for k, v in one_lm.model.state_dict().items())


def test_whatever_is_scored_for_training_is_remembered(one_lm: LanguageModel, tmp_path: Path) -> None:
    """By updates and by the correction of samples: a second run over the same completions asks for nothing."""
    trainer = make_trainer(
        one_lm, tmp_path, behaviour={"corrected": 0.5, "replay": 0.25}, corrected_particles=8
    )
    assert trainer.source.target is trainer.training_target
    batch = {"rows": ROWS}
    trainer._next_micro_step = lambda: (0, 0)  # type: ignore[method-assign]
    trainer._prepare_inputs(batch)
    asked: list[int] = []
    score = trainer.training_target.target.score
    trainer.training_target.target.score = lambda r: asked.append(1) or score(r)  # type: ignore
    trainer.buffer._entries.clear()
    trainer._prepare_inputs(batch)
    assert asked == []
    trainer.training_target.clear()
    trainer._prepare_inputs(batch)
    assert asked, "the control"


@pytest.mark.parametrize(
    "objective",
    [
        "subtb",
        {"tb": {"log_z": "learned"}},
        pytest.param({"prefix_tb": {"states": 2, "log_z": "learned"}}, marks=pytest.mark.slow),
        pytest.param({"alpha": {"alpha": 0.3}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_interrupted_and_resumed_equals_uninterrupted(
    one_lm: LanguageModel, tmp_path: Path, objective: Any
) -> None:
    """Adapter, optimiser, buffer, reward memory, schedules and random state: every loss and weight is the same to the bit."""
    settings = {
        "objective": objective,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "reward_temperature": (1.5, 1.0, 6),
        "behaviour": {"replay": 0.5, "tempered": 0.25},
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
    }
    whole = make_trainer(one_lm, tmp_path / "whole", **settings)
    whole.train()
    half = make_trainer(one_lm, tmp_path / "half", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    torch.manual_seed(99)  # whatever the interruption left behind
    half.train(resume_from_checkpoint=True)
    assert losses(half) == losses(whole)
    assert torch.equal(weights(half), weights(whole))
    assert half.buffer._entries == whole.buffer._entries
    assert half.training_target._children == whole.training_target._children
    assert repr(half.training_target._log_r) == repr(whole.training_target._log_r)  # nan is not nan
    # The control: with an empty buffer the resumed run goes elsewhere, so the comparison can fail.
    other = make_trainer(one_lm, tmp_path / "other", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "other" / "checkpoint-3")
    other.add_callback(EmptyBuffer(other))
    other.train(resume_from_checkpoint=True)
    assert losses(other) != losses(whole)


def test_accumulated_micro_batches_equal_one_batch(one_lm: LanguageModel, tmp_path: Path) -> None:
    """On-policy, the samples of a row depend on seed, step and row only, so the gradient is the same."""
    settings = {
        "max_steps": 1,
        "warmup_steps": 0,
        "behaviour": {"tempered": 0.5},
        "max_grad_norm": 0.0,
        "optim": "sgd",
    }
    whole = make_trainer(one_lm, tmp_path, per_device_train_batch_size=4, rows=ROWS[:4], **settings)
    parts = make_trainer(
        one_lm,
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        rows=ROWS[:4],
        **settings,
    )
    parts._next_micro_step = lambda: (0, 0)  # type: ignore[method-assign]  # both micro-batches: the same seed
    whole.train()
    parts.train(overwrite_output_dir=True)
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"objective": {"subtb": {"states": 2}}}, {"objective": "vargrad"}], ids=str
)
def test_copies_count_as_often_as_they_were_drawn(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """The loss is that of passes over every trajectory, copies and their own stopping states included."""
    trainer = make_trainer(one_lm, tmp_path, **settings)
    texts = [["cat", " dog", "cat", "cat ran"], [" a", " a", " a", " dog"]]
    rollouts = trainer.source.thin(trainer.policy.rollouts(ROWS[:2], texts), (0, 0))
    assert len(rollouts.distinct()[0]) == 5
    monkeypatch.setattr(trainer.source, "draw", lambda rows, step, choices: (rollouts, torch.zeros(8), 0))
    monkeypatch.setattr(trainer.source, "thin", lambda r, step: r)
    experience = trainer._prepare_inputs({"rows": ROWS[:2]})
    log_probs = trainer.policy.evaluate(rollouts)
    log_w = log_weights(trainer.target.score(rollouts), log_probs, rollouts.stop_mask)
    expected, _ = trainer._objective(log_w, experience)
    loss, found = trainer.compute_loss(trainer.policy, experience, return_outputs=True)
    torch.testing.assert_close(found, log_w)
    torch.testing.assert_close(loss, expected)


def test_reward_temperature_schedule() -> None:
    config = GFNConfig(reward_temperature=(1.1, 0.5, 10))
    assert [config.reward_temperature_at(s) for s in (0, 5, 10, 99)] == pytest.approx([1.1, 0.8, 0.5, 0.5])


def test_gold_completions_start_in_the_buffer(one_lm: LanguageModel, tmp_path: Path) -> None:
    gold = [[" a b."], [], [" c", " d a"], [], []]
    trainer = make_trainer(one_lm, tmp_path, gold=gold)
    assert len(trainer.buffer) == 3
    with pytest.raises(DataError, match="one list per row"):
        make_trainer(one_lm, tmp_path, gold=gold[:2])


def test_logs_and_sample_table(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, diagnose_steps=2)
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert {"loss", "log_w_variance", "ess", "elbo", "length", "buffer"} <= logged
    assert (tmp_path / "looks.jsonl").read_text().count('"step": 4') == 4


@pytest.mark.slow
def test_hard_constraints_train(one_lm: LanguageModel, tmp_path: Path) -> None:
    """R = 0 almost everywhere: the share of accepted samples rises, with and without a language-model term, if the
    constraint stays in the target."""
    for target in (one_lm.log_prob("{z}", given="{x}") + c.contains("a"), c.contains("a")):
        settings = {"target": target, "max_steps": 120, "num_samples": 16, "narrow_support": False}
        trainer = make_trainer(one_lm, tmp_path, **settings)
        before = sum(trainer.posterior.estimate(row, 256).valid for row in ROWS) / len(ROWS)
        trainer.train(overwrite_output_dir=True)
        after = sum(trainer.posterior.estimate(row, 256).valid for row in ROWS) / len(ROWS)
        assert before < 0.6
        assert after > 0.9


# Errors


def test_every_prefix_objectives_refuse_finished_only_targets(one_lm: LanguageModel, tmp_path: Path) -> None:
    judge = verifier(lambda texts, rows: [0.0] * len(texts))
    target = one_lm.log_prob("{z}", given="{x}") + judge
    for objective in ("subtb", "db", "prefix_tb"):
        with pytest.raises(RewardError, match=r"verifier.*vargrad.*every_prefix=True"):
            make_trainer(one_lm, tmp_path, target=target, objective=objective)
    make_trainer(one_lm, tmp_path, target=target, objective="vargrad").train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_reward_stops_with_the_completion(one_lm: LanguageModel, tmp_path: Path, value: float) -> None:
    target = one_lm.log_prob("{z}", given="{x}") + verifier(lambda texts, rows: [value] * len(texts), True)
    with pytest.raises(RewardError, match=r"NaN or \+inf for .*return finite numbers"):
        make_trainer(one_lm, tmp_path, target=target).train()


def test_bad_data(one_lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_dataset is empty: give at least one row"):
        make_trainer(one_lm, tmp_path, rows=[])
    with pytest.raises(DataError, match="row 1 has no column 'y'"):
        make_trainer(one_lm, tmp_path, rows=[ROWS[0], {"x": "a"}])
    with pytest.raises(PromptTooLongError, match="shorten the prompt"):
        make_trainer(one_lm, tmp_path, rows=[{"x": " a" * 5000, "y": " b"}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "subtbb"}, "did you mean 'subtb'"),
        ({"objective": "vargrad", "num_samples": 1}, "at least 2"),
        (
            {"objective": {"tb": {"log_z": "lerned"}}},
            "objective tb: log_z must be group or learned, got 'lerned'",
        ),
        ({"objective": {"subtb": {"lamda": 1}}}, "objective subtb: unknown key 'lamda'; did you mean 'lam'"),
        ({"objective": {"subtb": {"states": 1}}}, "at least 2"),
        ({"objective": {"prefix_tb": {"states": 1}}}, "objective prefix_tb: states must be at least 2"),
        (
            {"objective": {"vargrad": {"huber": 0}}},
            "objective vargrad: huber must be a number of nats above 0",
        ),
        ({"objective": {"alpha": {"alpha": 0}}}, "its limit at 0 is objective='vargrad'"),
        ({"objective": "alpha", "num_samples": 1}, "at least 2"),
        ({"objective": {"subtb": {}, "tb": {}}}, "a name, or a name with its settings"),
        ({"objective": 3}, "a name, or a name with its settings"),
        ({"behaviour": {"replay": 1.5}}, "sum to one, and these sum to 1.5"),
        ({"behaviour": {"replay": -0.5}}, "shares must be at least 0"),
        ({"behaviour": {"replay": 0.5, "policy": 0.4}}, "these sum to 0.9"),
        ({"behaviour": {"replai": 0.5}}, "behaviour: unknown key 'replai'; did you mean 'replay'"),
        ({"behaviour": {"replay": "half"}}, "behaviour: replay must be a number, got 'half'"),
        ({"behaviour": 0.5}, "behaviour must be a mapping"),
        ({"epsilon": 2}, r"\[0, 1\]"),
        ({"temperature_range": (2.0, 1.0)}, "ordered"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GFNConfig(**settings)


def test_a_loss_that_is_not_finite_stops(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path)
    trainer._objective = lambda log_w, experience: (log_w.sum() * math.nan, {})  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="lower learning_rate"):
        trainer.train()


@pytest.mark.parametrize(
    "victim",
    [
        "trainer_state.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "process-0/buffer.safetensors",
        "process-0/buffer.json",
    ],
)
def test_checkpoint_cut_short(one_lm: LanguageModel, tmp_path: Path, victim: str) -> None:
    """A truncated file gives one error; asking for the last complete checkpoint passes over an unfinished one."""
    settings = {"save_strategy": "steps", "save_steps": 2, "behaviour": {"replay": 0.5, "tempered": 0.25}}
    make_trainer(one_lm, tmp_path, **settings).train()
    file = tmp_path / "checkpoint-4" / victim
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="resume from"):
        make_trainer(one_lm, tmp_path, **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    if victim == "trainer_state.json":
        resumed = make_trainer(one_lm, tmp_path, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 4


def test_nothing_to_resume(one_lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        make_trainer(one_lm, tmp_path).train(resume_from_checkpoint=True)


def with_floor(floor: float) -> Target:
    """Accepts what begins with an a: 46 of 2,070 completions."""
    return verifier(lambda texts, rows: [0.0 if t.startswith("a") else floor for t in texts])


@pytest.mark.parametrize(
    ("floor", "warned"),
    [
        (-1.0, True),  # all rejected ones weigh exp(6.6), all accepted ones exp(3.8)
        (-3.0, True),
        (-9.0, False),
        (-torch.inf, False),
    ],
)
def test_a_floor_that_outweighs_what_is_accepted(
    one_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, floor: float, warned: bool
) -> None:
    settings = {"objective": "vargrad", "support": Support(stop=".", min_tokens=1, max_tokens=2)}
    trainer = make_trainer(
        one_lm, tmp_path, target=with_floor(floor), num_samples=128, max_steps=3, rows=ROWS[:1], **settings
    )
    trainer.train()
    assert ("rejected completions outweigh accepted ones" in caplog.text) == warned
    assert caplog.text.count("outweigh") <= 1


def test_rows_that_the_sampler_cannot_tell_apart(
    one_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = one_lm.log_prob("{z}{y}", given="{x}")
    rows = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(zip("abab", "cdee", strict=True))]
    make_trainer(one_lm, tmp_path / "mixed", rows, target=target, prompt="{x}")
    warning = (
        "rows 0 and 2 of train_dataset have the same prompt and differ in 'y', which only the target uses"
    )
    assert caplog.text.count("differ in") == caplog.text.count(warning) == 1
    assert "show {y} in the prompt" in caplog.text
    caplog.clear()
    for prompt, asked in (("{y} {x}", rows), ("{x}", rows[:2]), ("{x}", [rows[0], {**rows[0], "id": 7}])):
        make_trainer(one_lm, tmp_path / "told", asked, target=target, prompt=prompt)
    assert caplog.text == ""


def test_no_floor_where_rewards_differ(
    one_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor where all are alike: a uniform posterior."""
    for name, target in {
        "model": one_lm.log_prob("{z}{y}", given="{x}"),
        "uniform": verifier(lambda texts, rows: [0.0] * len(texts)),
    }.items():
        make_trainer(
            one_lm, tmp_path / name, target=target, objective="vargrad", num_samples=32, max_steps=2
        ).train()
    assert caplog.text == ""
