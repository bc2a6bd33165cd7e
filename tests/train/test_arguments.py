"""Arguments of `transformers.Trainer`: each does what it says or is refused; what a terminal and a pipe show."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import re
import struct
import sys
import termios
from collections import Counter
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from trainers import ROWS, losses, make_trainer, weights
from transformers import TrainingArguments

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Policy, Support
from amortlm.engine.adapter import default_lora
from amortlm.errors import CheckpointError, ConfigError, DataError
from amortlm.train.config import REFUSED
from amortlm.types import to_json

# Settings


def test_epochs_count_where_no_updates_are_given(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, max_steps=-1, num_train_epochs=2)  # 5 rows, 2 an update
    trainer.train()
    assert trainer.state.global_step == 6
    assert GFNConfig().max_steps == 200
    assert GFNConfig(num_train_epochs=2).max_steps == -1
    saved = GFNConfig(max_steps=7)
    assert (saved.max_steps, saved.num_train_epochs) == (7, 0)
    assert replace(saved, seed=3).max_steps == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "whole number of updates of at least 1"),
        ({"max_steps": 1.5}, "whole number of updates of at least 1"),
        ({"num_train_epochs": -1}, "epochs above 0"),
        ({"max_steps": 5, "num_train_epochs": 2}, "give one of them"),
        ({"fp16": True, "use_cpu": True}, "fp16 needs a GPU"),
        ({"train_sampling_strategy": "group_by_length"}, "'random' or 'sequential'"),
        ({"metric_for_best_model": "eval_lebo"}, "did you mean 'elbo'"),
        ({"lr_scheduler_type": "cosin"}, "cosin"),
        ({"resume_from_checkpoint": "runs/x"}, "pass it to trainer.train"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GFNConfig(**settings)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_do_nothing_is_refused_with_a_remedy(name: str) -> None:
    """Every such field still exists, passes with its default, and is named with what to do."""
    assert hasattr(TrainingArguments("x"), name)
    default = getattr(GFNConfig(), name)
    other = not default if isinstance(default, bool) else [1] if isinstance(default, list) else 99
    with pytest.raises(ConfigError, match=f"{name}=.* has no use here: .{{20,}}"):
        GFNConfig(**{name: other})


def test_arguments_of_the_trainer(one_lm: LanguageModel, tmp_path: Path) -> None:
    lm = one_lm
    for name in ("compute_metrics", "compute_loss_func", "processing_class"):
        with pytest.raises(ConfigError, match=f"takes no {name}; of Trainer it takes callbacks"):
            make_trainer(lm, tmp_path, extra={name: print})
    with pytest.raises(ConfigError, match="give eval_dataset"):
        make_trainer(lm, tmp_path, eval_strategy="steps")
    with pytest.raises(DataError, match="no column 'y'"):
        make_trainer(lm, tmp_path, extra={"eval_dataset": [{"x": "a"}]})
    with pytest.raises(ConfigError, match="drops all 5 rows"):
        make_trainer(lm, tmp_path, dataloader_drop_last=True, per_device_train_batch_size=8)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lm", "gpt2", r"lm is a str, not a LanguageModel: give LanguageModel.from_pretrained"),
        ("target", len, r"target is a builtin_function_or_method, not a Target: .*verifier\(fn\)"),
        ("support", ".", r"support is a str, not a Support: give Support\("),
        ("args", TrainingArguments("runs/x"), r"args is a TrainingArguments, not a GFNConfig"),
    ],
)
def test_what_is_no_part_of_a_trainer_says_what_to_give(
    one_lm: LanguageModel, name: str, value: Any, message: str
) -> None:
    parts = {"lm": one_lm, "target": one_lm.log_prob("{z}"), "support": Support("."), "args": GFNConfig()}
    with pytest.raises(ConfigError, match=message):
        GFNTrainer(**{**parts, name: value}, prompt="{x}", train_dataset=ROWS)


def test_several_gpus_in_one_process_are_one() -> None:
    """nn.DataParallel would hand every GPU the whole batch."""
    config = GFNConfig(per_device_train_batch_size=3)
    config._n_gpu = 4
    assert (config.n_gpu, config.train_batch_size) == (1, 3)


# Passes


@pytest.mark.parametrize("adapter", [default_lora(4), "full"], ids=["lora", "full"])
def test_checkpointed_activations_give_the_same_gradients(one_lm: LanguageModel, adapter: Any) -> None:
    gradients = []
    for settings in (
        None,
        {"activation_checkpointing_kwargs": None},
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    ):
        torch.manual_seed(0)
        policy = Policy(one_lm, "{x}{y}", Support(stop=".", max_tokens=4), adapter)
        if adapter != "full":  # B = 0 at the start, which hides the gradient of A
            for name, p in policy.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(p, std=0.1)
        if settings is not None:
            policy.activation_checkpointing_enable(**settings)
        count = Counter[str]()
        layer = next(m for name, m in policy.named_modules() if name.endswith("self_attn"))
        layer.register_forward_pre_hook(lambda *_, count=count: count.update(["passes"]))
        rollouts = policy.rollouts(ROWS[:2], [[" a b", " c"], [" the cat"]])
        log_q = policy.train()(rollouts).final(rollouts.lengths).sum()
        forward = count["passes"]
        log_q.backward()
        assert (count["passes"] > forward) == (settings is not None), "computed again in the backward pass"
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    plain, *checkpointed = gradients
    assert sum(g.norm() for g in plain.values()) > 1
    for found in checkpointed:
        assert found.keys() == plain.keys()
        for name, g in plain.items():
            assert (found[name] - g).norm() <= 1e-5 * g.norm() + 1e-6, name


def test_gradient_checkpointing_trains_as_without(one_lm: LanguageModel, tmp_path: Path) -> None:
    found = []
    names = {"activation_checkpointing", "gradient_checkpointing"} & {f.name for f in fields(GFNConfig)}
    for more in ({}, *({name: True} for name in sorted(names))):
        trainer = make_trainer(one_lm, tmp_path / f"{len(found)}", max_steps=2, **more)
        trainer.train()
        found.append(weights(trainer))
    for checkpointed in found[1:]:
        torch.testing.assert_close(checkpointed, found[0], atol=1e-5, rtol=1e-4)


def test_bf16_on_a_cpu(one_lm: LanguageModel, tmp_path: Path) -> None:
    """Mixed precision: weights stay float32, the loss is near that of float32 but is not it."""
    one, mixed = (make_trainer(one_lm, tmp_path / f"{b}", max_steps=1, bf16=b) for b in (False, True))
    one.train(), mixed.train()
    assert losses(mixed) != losses(one)
    assert losses(mixed) == pytest.approx(losses(one), rel=0.05)
    assert weights(mixed).dtype == torch.float32


# Evaluation


def test_eval_dataset_is_what_is_diagnosed(one_lm: LanguageModel, tmp_path: Path) -> None:
    """`evaluate` looks at all its rows, the callback at the first ones; the best of the checkpoints is kept."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(
        one_lm,
        tmp_path,
        rows=ROWS[:2],
        diagnose_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_log_w_variance",
        learning_rate=0.5,  # far too high: it gets worse
        warmup_steps=0,
        extra={"eval_dataset": ROWS[2:]},
        **settings,
    )
    assert not trainer.args.greater_is_better
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_ess" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    seen = {json.loads(line)["row"]["x"] for line in (tmp_path / "looks.jsonl").read_text().splitlines()}
    assert seen == {row["x"] for row in ROWS[2:]}
    best = min(evaluated, key=lambda entry: entry["eval_log_w_variance"])
    again = trainer.evaluate()
    assert {
        "eval_ess",
        "eval_elbo",
        "eval_log_z",
        "eval_valid",
        "eval_log_reward",
        "eval_runtime",
    } <= again.keys()
    assert again["eval_log_w_variance"] == pytest.approx(best["eval_log_w_variance"], rel=1e-4)
    mean = sum(trainer.posterior.estimate(r, 64, seed=("diagnose", 42)).elbo for r in ROWS[2:]) / 3
    assert again["eval_elbo"] == pytest.approx(mean)
    assert "held_out_ess" in trainer.evaluate(ROWS[:1], metric_key_prefix="held_out")
    with pytest.raises(DataError, match="evaluate\\(\\) has no rows"):
        make_trainer(one_lm, tmp_path).evaluate()
    with pytest.raises(ConfigError, match="trainer.posterior"):
        trainer.predict(ROWS)


def test_a_diagnosis_does_not_take_the_place_of_a_log(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, diagnose_steps=2, logging_steps=2)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]


def test_a_checkpoint_of_other_processes(one_lm: LanguageModel, tmp_path: Path) -> None:
    """Each process has a replay buffer of its own, so as many must go on."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(one_lm, tmp_path, **settings).train()
    about = tmp_path / "run.json"
    saved = json.loads(about.read_text())
    saved["identity"]["the number of processes"] = 2
    about.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match="the number of processes was 2, is 1"):
        make_trainer(one_lm, tmp_path, **settings).train(resume_from_checkpoint=True)


# What is shown and written


def test_rows_with_any_cell_are_written(one_lm: LanguageModel, tmp_path: Path) -> None:
    rows = [
        {**row, "day": date(2024, 1, 1), "score": math.nan, "v": torch.tensor([1.0, math.inf])}
        for row in ROWS
    ]
    make_trainer(one_lm, tmp_path, rows=rows, max_steps=1, diagnose_steps=1).train()
    lines = (tmp_path / "looks.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[0], parse_constant=lambda name: pytest.fail(name))["row"]
    assert (row["day"], row["score"], row["v"]) == ("2024-01-01", None, [1.0, None])
    assert json.loads(to_json({"x": "é"})) == {"x": "é"}


@pytest.mark.parametrize("columns", [120, 0])
def test_progress_on_a_terminal(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Rate, time left, loss and ESS, also where the terminal does not know its width."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", columns // 3, columns, 0, 0))
    shown: list[bytes] = []
    reader = Thread(target=read_all, args=(master, shown))
    reader.start()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        make_trainer(one_lm, tmp_path, max_steps=3, diagnose_steps=2).train()
        monkeypatch.undo()
    reader.join()
    bars = b"".join(shown).decode()
    assert re.search(r"3/3 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(it/s|s/it), loss=.*, ESS=0\.\d+", bars), bars


def read_all(terminal: int, into: list[bytes]) -> None:
    try:
        while part := os.read(terminal, 4096):
            into.append(part)
    except OSError:  # the other end is closed
        os.close(terminal)


def test_silence_in_a_pipe(one_lm: LanguageModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_trainer(one_lm, tmp_path, max_steps=3, diagnose_steps=2).train()
    assert capfd.readouterr() == ("", "")


def test_a_notebook_is_shown_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GFNConfig().disable_tqdm is (not sys.stderr.isatty())
    monkeypatch.setattr("amortlm.train.config.is_in_notebook", lambda: True)
    assert GFNConfig().disable_tqdm is False
    assert GFNConfig(disable_tqdm=True).disable_tqdm is True
