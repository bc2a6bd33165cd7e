"""What belongs to a run, what is written of it, and how it ends: no work is lost, none is taken for another's."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from trainers import ROWS, losses, make_trainer, weights
from transformers import TrainerCallback

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Posterior, Support, verifier
from amortlm.diagnostics.importance import estimate
from amortlm.engine.adapter import default_lora
from amortlm.errors import CheckpointError, ConfigError
from amortlm.train import checkpoints, run
from amortlm.train.interruption import SIGNALS
from amortlm.train.outcome import Standing

STEPS = {
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 4,
    "behaviour": {"replay": 0.5, "tempered": 0.25},
}


@pytest.fixture(scope="module")
def four_steps(models: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> GFNTrainer:
    trainer = make_trainer(models["llama-untied"], tmp_path_factory.mktemp("four") / "run", **STEPS)
    trainer.train()
    return trainer


@pytest.fixture
def finished(four_steps: GFNTrainer, tmp_path: Path) -> GFNTrainer:
    """A run of four steps with four checkpoints, and a copy of its folder in tmp_path/run."""
    shutil.copytree(str(four_steps.args.output_dir), tmp_path / "run")
    return four_steps


def interrupted(tmp_path: Path) -> Path:
    """The folder of `finished` as it was after the fourth checkpoint."""
    folder = tmp_path / "run"
    for file in folder.iterdir():
        if file.is_file() and file.name != run.FILE:
            file.unlink()
    run.write(folder, json.loads((folder / run.FILE).read_text())["identity"])
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != run.LOCK]
    return {p: p.read_bytes() for p in files}


class At(TrainerCallback):
    """Does something at the start of a step (the first is 0)."""

    def __init__(self, step: int, act: Callable[[], Any]):
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


# Whose run it is


def test_resume_takes_only_its_own(
    models: dict[str, LanguageModel], one_lm: LanguageModel, tmp_path: Path, finished: GFNTrainer
) -> None:
    """Whatever a run depends on, another one is refused by name, finished or not, and nothing in its folder changes."""
    folder = tmp_path / "run"
    target = one_lm.log_prob("{z}{y}", given="{x}")
    others: list[tuple[str, dict[str, Any]]] = [
        ("seed was 42, is 7", {"seed": 7}),
        ("learning_rate was 0.01, is 0.02", {"learning_rate": 2e-2}),
        ("max_steps was 4, is 5", {"max_steps": 5}),
        ("objective was 'subtb', is 'db'", {"objective": "db"}),
        ("target was", {"target": target * 2.0}),
        ("prompt was", {"prompt": "{x}"}),
        ("support.max_tokens was 3, is 2", {"support": Support(stop=".", min_tokens=1, max_tokens=2)}),
        ("adapter.r was 4, is 2", {"adapter": default_lora(2)}),
        ("adapter was", {"adapter": "full"}),
        ("the adapter's first weights changed", {"adapter": str(folder / "checkpoint-3")}),
        ("the data changed", {"rows": ROWS[:4]}),
        ("the data changed", {"rows": ROWS[::-1]}),
        ("the gold completions", {"gold": [[" a b."], [], [], [], []]}),
    ]
    for is_finished in (True, False):
        if not is_finished:
            interrupted(tmp_path)
        before = contents(folder)
        for named, changes in others:
            trainer = make_trainer(one_lm, folder, **{**STEPS, **changes})
            with pytest.raises(CheckpointError, match=f"of another run: .*{named}"):
                trainer.train(resume_from_checkpoint=True)
        other = make_trainer(models["gpt2-tied"], folder, **STEPS)
        with pytest.raises(CheckpointError, match="the model's weights changed"):
            other.train(resume_from_checkpoint=True)
        assert contents(folder) == before
    # Of a checkpoint elsewhere, too; and what changes nothing of what is learned is free.
    elsewhere = make_trainer(one_lm, tmp_path / "new", **STEPS, seed=7)
    with pytest.raises(CheckpointError, match="seed was 42, is 7"):
        elsewhere.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    free = {"save_steps": 2, "logging_steps": 3, "diagnose_steps": 2, "save_total_limit": 3}
    again = make_trainer(one_lm, tmp_path / "again", **{**STEPS, **free})
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert torch.equal(weights(again), weights(finished))


def test_a_run_of_an_earlier_version_is_another(
    one_lm: LanguageModel, tmp_path: Path, finished: GFNTrainer
) -> None:
    """Its settings had other names: refused in a sentence, and not taken for defaults."""
    file = tmp_path / "run" / run.FILE
    stated = json.loads(file.read_text())
    mix = stated["identity"]["settings"].pop("behaviour")
    stated["identity"]["settings"] |= {"replay_ratio": mix["replay"], "tempered_ratio": 0.5}
    file.write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match="of another run: .*behaviour was None, is .*'replay': 0.5"):
        make_trainer(one_lm, tmp_path / "run", **STEPS).train(resume_from_checkpoint=True)


def test_a_models_name_is_where_it_lies_its_weights_what_it_is(one_lm: LanguageModel, tmp_path: Path) -> None:
    def identity(lm: LanguageModel) -> dict[str, Any]:
        t = make_trainer(lm, tmp_path)
        return run.identity(t.policy, t.target, t.train_dataset, t.args)

    moved = LanguageModel(one_lm.model, one_lm.tokenizer, "elsewhere")
    assert run.difference(identity(one_lm), identity(moved)) is None
    now = identity(one_lm)
    other = copy.deepcopy(one_lm)
    other.model.get_output_embeddings().weight.data[5] += 0.01
    assert run.difference(now, identity(other)) == "the model's weights changed"


def test_a_used_folder_is_refused_before_anything_happens(
    one_lm: LanguageModel, tmp_path: Path, finished: GFNTrainer
) -> None:
    folder = tmp_path / "run"
    for left in ("finished", "checkpoints"):
        if left == "checkpoints":
            interrupted(tmp_path)
        new = make_trainer(one_lm, folder, **STEPS, seed=7)
        start = weights(new)
        with pytest.raises(CheckpointError, match="resume_from_checkpoint=True.*overwrite_output_dir=True"):
            new.train()
        assert torch.equal(weights(new), start)
    with pytest.raises(ConfigError, match="give one of them"):
        new.train(resume_from_checkpoint=True, overwrite_output_dir=True)


def test_starting_over_leaves_nothing_of_the_old_run(
    one_lm: LanguageModel, tmp_path: Path, finished: GFNTrainer
) -> None:
    folder = tmp_path / "run"
    stale = [folder / name for name in ("certificate.json", "looks.jsonl", "checkpoint-9")]
    for file in stale[:2]:
        file.write_text("old")
    shutil.copytree(folder / "checkpoint-4", stale[2])
    (folder / "notes.txt").write_text("not ours")
    new = make_trainer(one_lm, folder, **STEPS, seed=7)
    new.add_callback(At(0, lambda: seen.extend(sorted(p.name for p in folder.iterdir()))))
    seen: list[str] = []
    new.train(overwrite_output_dir=True)
    assert {"notes.txt", "run.json"} <= set(seen)
    gone = (
        "adapter",
        "posterior",
        "checkpoint",
        "certificate",
        "looks",
        "report",
        "training_args",
        "trainer_state",
    )
    assert not [name for name in seen if name.startswith(gone)]
    assert not stale[0].exists()
    assert not stale[2].exists()
    assert "old" not in stale[1].read_text(), "the end of the new run has been looked at"
    stated = json.loads((folder / "run.json").read_text())
    assert stated["finished"] is True
    assert stated["identity"]["settings"]["seed"] == 7


def test_files_that_are_no_run_of_ours_stay(one_lm: LanguageModel, tmp_path: Path) -> None:
    """A folder with a model and data in it may be trained in."""
    kept = [tmp_path / name for name in ("model.safetensors", "rows.jsonl", "config.json")]
    for file in kept:
        file.write_text("mine")
    make_trainer(one_lm, tmp_path, max_steps=1).train()
    assert [file.read_text() for file in kept] == ["mine"] * 3


def test_one_run_a_folder(one_lm: LanguageModel, tmp_path: Path) -> None:
    with run.locked(tmp_path), pytest.raises(CheckpointError, match="another process is training in"):
        make_trainer(one_lm, tmp_path).train()
    make_trainer(one_lm, tmp_path, max_steps=1).train()


def test_what_does_not_say_whose_it_is(one_lm: LanguageModel, tmp_path: Path, finished: GFNTrainer) -> None:
    """A checkpoint without its run, as older versions wrote it."""
    folder = interrupted(tmp_path)
    (folder / run.FILE).unlink()
    (folder / "checkpoint-4" / run.FILE).unlink()
    checkpoints.seal(folder / "checkpoint-4", 1)
    with pytest.raises(CheckpointError, match="does not state its run.*overwrite_output_dir"):
        make_trainer(one_lm, folder, **STEPS).train(resume_from_checkpoint=True)


# The end


def test_the_posterior_is_saved_whatever_becomes_of_checkpoints(
    one_lm: LanguageModel, tmp_path: Path
) -> None:
    assert GFNConfig(save_strategy=False).save_strategy == "no"  # YAML's reading of a bare no
    trainer = make_trainer(one_lm, tmp_path, save_strategy="no")
    trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    loaded = Posterior.from_pretrained(tmp_path, lm=one_lm)
    expected = trainer.posterior.log_prob(ROWS[0], [" a", " a cat"])
    torch.testing.assert_close(loaded.log_prob(ROWS[0], [" a", " a cat"]), expected)


def test_a_finished_run_makes_no_further_step(
    one_lm: LanguageModel, tmp_path: Path, finished: GFNTrainer
) -> None:
    """Resumed when it is saved, and from its last checkpoint, which is in the middle of an epoch."""
    for is_finished in (True, False):
        folder = tmp_path / "run" if is_finished else interrupted(tmp_path)
        again = make_trainer(one_lm, folder, **STEPS)
        again.add_callback(At(4, lambda: pytest.fail("a step too many")))
        assert again.train(resume_from_checkpoint=True).global_step == 4
        assert torch.equal(weights(again), weights(finished))
        assert losses(again) == losses(finished)
        assert (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_file_modes_follow_the_umask(one_lm: LanguageModel, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        make_trainer(
            one_lm, tmp_path / "run", **{**STEPS, "max_steps": 1}, objective={"tb": {"log_z": "learned"}}
        ).train()
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != run.LOCK]
    assert sum(p.suffix == ".safetensors" for p in files) == 5
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in files} == {
        p.name: oct(0o666 & ~mask) for p in files
    }


# Damage

VICTIMS = (
    *("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    *("process-0/buffer.safetensors", "process-0/memory.json", "run.json", "manifest.json"),
)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_damaged_checkpoint_is_passed_over(
    one_lm: LanguageModel, tmp_path: Path, finished: GFNTrainer, caplog: pytest.LogCaptureFixture, victim: str
) -> None:
    """Cut short, or as long as before with another byte in the middle: the one before it is taken, and that is said."""
    folder = interrupted(tmp_path)
    for number, cut in ((4, True), (3, False)):
        file = folder / f"checkpoint-{number}" / victim
        data = file.read_bytes()
        middle = len(data) // 2
        other = b"" if cut else bytes([data[middle] ^ 255]) + data[middle + 1 :]
        file.write_bytes(data[:middle] + other)
    again = make_trainer(one_lm, folder, **STEPS)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    said = [r.message for r in caplog.records if "resuming from" in r.message]
    assert len(said) == 1
    for words in ("checkpoint-2", "checkpoint-3", "checkpoint-4", Path(victim).name):
        assert words in said[0]
    assert torch.equal(weights(again), weights(finished))
    assert checkpoints.damage(folder / "checkpoint-4") is None, "it was written anew"


def test_nothing_whole_is_left(one_lm: LanguageModel, tmp_path: Path, finished: GFNTrainer) -> None:
    folder = interrupted(tmp_path)
    for checkpoint in checkpoints.begun(folder):
        (checkpoint / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint: .*optimizer.pt has 0 of.*start over"):
        make_trainer(one_lm, folder, **STEPS).train(resume_from_checkpoint=True)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("victim", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_objects_are_refused_and_not_loaded(
    one_lm: LanguageModel, tmp_path: Path, finished: GFNTrainer, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = interrupted(tmp_path) / "checkpoint-3"
    torch.save({"state": Bomb()}, folder / victim, pickle_module=pickle)
    checkpoints.seal(folder, 1)
    with pytest.raises(CheckpointError, match="was not read.*could run code") as caught:
        make_trainer(one_lm, tmp_path / "run", **STEPS).train(resume_from_checkpoint=str(folder))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@contextmanager
def file_limit() -> Iterator[Callable[[int], None]]:
    """Within, no file may grow beyond so many bytes, once that is said: to those who write it is a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("last", ["optimizer.pt", "adapter_model.safetensors", "README.md"])
def test_a_full_disk(one_lm: LanguageModel, tmp_path: Path, four_steps: GFNTrainer, last: str) -> None:
    """Whoever meets it (torch, safetensors, Python): one sentence, and what was saved before is gone on from."""
    size = (Path(str(four_steps.args.output_dir)) / "checkpoint-2" / last).stat().st_size // 2
    trainer = make_trainer(one_lm, tmp_path, **STEPS)
    with file_limit() as limit:
        trainer.add_callback(At(2, lambda: limit(size)))
        with pytest.raises(
            CheckpointError, match="its disk.*is full.*intact.*continues from checkpoint-2"
        ) as caught:
            trainer.train()
    assert "\n" not in str(caught.value)
    assert [p.name for p in checkpoints.begun(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    again = make_trainer(one_lm, tmp_path, **STEPS)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again), weights(four_steps))


def test_a_full_disk_at_the_end(one_lm: LanguageModel, tmp_path: Path, finished: GFNTrainer) -> None:
    """A posterior saved over another one is there as a whole or not at all."""
    folder = tmp_path / "run"
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    trainer = make_trainer(one_lm, folder, **STEPS)
    with file_limit() as limit:
        limit(len(before["adapter_model.safetensors"]) // 2)
        with pytest.raises(SafetensorError):
            trainer.save_model()
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    trainer.save_model()
    assert (folder / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]


def test_other_errors_of_writing_stay_what_they_are(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path)

    def fail() -> None:
        raise RuntimeError("out of memory")

    trainer.add_callback(At(1, fail))
    with pytest.raises(RuntimeError, match="^out of memory$"):
        trainer.train()


# Signals


def signalled(trainer: GFNTrainer, numbers: list[int], step: int = 1) -> list[int]:
    """Train, and send signals in step `step`. What they did in the end."""
    effects: list[int] = []
    before = {n: signal.signal(n, lambda number, _: effects.append(number)) for n in SIGNALS}
    ours = {n: signal.getsignal(n) for n in SIGNALS}
    trainer.add_callback(At(step, lambda: [signal.raise_signal(n) for n in numbers]))
    try:
        trainer.train()
        assert {n: signal.getsignal(n) for n in SIGNALS} == ours, "handlers are given back"
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    return effects


@pytest.mark.parametrize(("number", "strategy"), [*zip(SIGNALS, ["no", "steps", "epoch"], strict=True)])
def test_a_signal_saves_first(
    one_lm: LanguageModel,
    tmp_path: Path,
    four_steps: GFNTrainer,
    caplog: pytest.LogCaptureFixture,
    number: int,
    strategy: str,
) -> None:
    """Resumed, the run ends where the uninterrupted one does, to the bit."""
    settings = {**STEPS, "save_strategy": strategy, "save_steps": 3, "save_only_model": strategy == "no"}
    trainer = make_trainer(one_lm, tmp_path / "run", **settings)
    with caplog.at_level(logging.WARNING):
        assert signalled(trainer, [number]) == [number]
    assert trainer.state.global_step == 2
    saved = tmp_path / "run" / "checkpoint-2"
    assert f"{signal.Signals(number).name}: saved {saved}; resume_from_checkpoint=True" in caplog.text
    assert checkpoints.begun(tmp_path / "run") == [saved]
    assert not (tmp_path / "run" / "posterior.json").exists(), "it is not trained"
    resumed = make_trainer(one_lm, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(four_steps))
    assert resumed.buffer._entries == four_steps.buffer._entries


def test_the_same_signal_again_ends_at_once(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, **{**STEPS, "save_steps": 3})
    trainer.add_callback(At(1, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert checkpoints.begun(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_in_the_last_step_lets_the_run_finish(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, **STEPS)
    assert signalled(trainer, [signal.SIGTERM], step=3) == [signal.SIGTERM]
    assert run.is_finished(tmp_path)


def test_what_is_ignored_stays_ignored(one_lm: LanguageModel, tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = make_trainer(one_lm, tmp_path)
        trainer.add_callback(At(1, lambda: signal.raise_signal(signal.SIGHUP)))
        trainer.train()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.state.global_step == 4


def test_training_in_another_thread_leaves_signals_alone(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert run.is_finished(tmp_path)


# kill -9: what it leaves behind is what was on the disk

WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile"}


class Snapshots:
    """Copies of a folder before some of what is written there."""

    def __init__(self, folder: Path, into: Path):
        self.folder, self.into, self.active, self.count = folder, into, False, 0
        self.random = random.Random(0)
        sys.addaudithook(self)  # cannot be taken away again

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if (
            not self.active
            or event not in WRITES
            or (event == "open" and not set(str(args[1])) & set("wax+"))
        ):
            return
        if not str(args[0]).startswith(str(self.folder)):
            return
        self.active = False
        if self.random.random() < 0.02:
            shutil.copytree(self.folder, self.into / str(self.count))
        self.count += 1
        self.active = True


@pytest.mark.slow
def test_killed_at_any_write(one_lm: LanguageModel, tmp_path: Path) -> None:
    """From what is on the disk at random ones of these moments, half of them with the newest file cut short, a run
    ends where the uninterrupted one does, to the bit."""
    settings = {**STEPS, "save_total_limit": 2, "diagnose_steps": 2}
    whole = make_trainer(one_lm, tmp_path / "run", **settings)
    taken = Snapshots(tmp_path / "run", tmp_path / "snapshots")
    taken.active = True
    whole.train()
    taken.active = False
    assert taken.count > 100
    gone_on = set()
    for i, folder in enumerate(sorted((tmp_path / "snapshots").iterdir(), key=lambda p: int(p.name))):
        files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
        if i % 2 and files:
            newest = max(files, key=lambda p: p.stat().st_mtime_ns)
            newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
        again = make_trainer(one_lm, folder, **settings)
        found = run.can_resume(folder)
        again.train(resume_from_checkpoint=found, overwrite_output_dir=not found)
        assert torch.equal(weights(again), weights(whole)), folder
        adapter = "adapter_model.safetensors"
        assert (folder / adapter).read_bytes() == (tmp_path / "run" / adapter).read_bytes()
        gone_on.add(found)
    assert True in gone_on, "moments after the first checkpoint"


# What came of it


def test_nothing_is_accepted(one_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nothing = one_lm.log_prob("{z}", given="{x}") + verifier(
        lambda texts, rows: [-float("inf")] * len(texts), True
    )
    make_trainer(one_lm, tmp_path / "nothing", target=nothing, max_steps=1, rows=ROWS[:2]).train()
    assert (
        "training found nothing: the target rejects all of 8 completions drawn for 2 prompts" in caplog.text
    )
    caplog.clear()
    make_trainer(one_lm, tmp_path / "control", max_steps=1, rows=ROWS[:2], diagnose_steps=1).train()
    assert caplog.text == ""


ITSELF = {"support": Support(stop=".", max_tokens=3), "warmup_steps": 0, "max_grad_norm": 0.0}


@pytest.mark.parametrize("adapter", [default_lora(4), "full"], ids=["lora", "full"])
def test_the_best_state_is_kept(
    one_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, adapter: Any
) -> None:
    """Steps far too large: the sampler that was right before training is what is saved, and the run says so."""
    target = one_lm.log_prob("{z}", given="{x}{y}")
    settings = {**ITSELF, "target": target, "diagnose_steps": 1, "max_steps": 2, "adapter": adapter}
    trainer = make_trainer(one_lm, tmp_path / "run", learning_rate=3.0, **settings)
    rollouts, before = trainer.policy.sample(ROWS[:2], 4, seed=0)
    trainer.train()
    assert "the sampler was better at step 0 (ELBO" in caplog.text
    saved = Posterior.from_pretrained(tmp_path / "run", lm=one_lm, target=target)
    for policy in (trainer.policy, saved.policy):
        assert torch.allclose(policy.evaluate(rollouts).log_pf, before.log_pf, atol=1e-5)
    assert not (tmp_path / "run" / "best").exists()
    caplog.clear()
    settings["diagnose_steps"] = 0
    worse = make_trainer(one_lm, tmp_path / "control", learning_rate=3.0, **settings)
    worse.train()
    assert not torch.allclose(worse.policy.evaluate(rollouts).log_pf, before.log_pf, atol=1.0), "the control"
    assert caplog.text == ""


def test_the_end_is_kept_where_it_is_best(
    one_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(one_lm, tmp_path, diagnose_steps=2, max_steps=6)
    ends: list[torch.Tensor] = []
    trainer.add_callback(AtTheEnd(lambda: ends.append(weights(trainer))))
    trainer.train()
    assert torch.equal(weights(trainer), ends[0])
    assert caplog.text == ""


class AtTheEnd(TrainerCallback):
    def __init__(self, act: Callable[[], None]):
        self.act = act

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.act()


def test_a_standing_is_worse_beyond_noise_only() -> None:
    """Three standard errors of the difference: a false alarm in 740, were both sets of samples independent."""
    log_w = torch.linspace(-1, 1, 64)
    best = Standing.of(0, [estimate(log_w)])
    assert not Standing.of(9, [estimate(log_w - 0.2)]).is_worse_than(best)
    assert Standing.of(9, [estimate(log_w - 0.6)]).is_worse_than(best)
    rejected = torch.cat([log_w[:32], torch.full((32,), -torch.inf)])
    assert Standing.of(9, [estimate(rejected + 1.0)]).is_worse_than(best), "half is rejected"
    nothing = [estimate(torch.full((64,), -torch.inf))]
    assert Standing.of(9, nothing).is_worse_than(best)
    assert not Standing.of(9, nothing).is_worse_than(Standing.of(0, nothing))


@pytest.mark.parametrize("size", [1, 3, 100, 2**24 + 4])
def test_the_name_of_weights_looks_at_the_last_number(size: int) -> None:
    """2**24: from there on 32-bit floats skip whole numbers, and an embedding of 49,152 tokens is larger."""
    blank = torch.zeros(1, dtype=torch.int8).expand(size)
    other = blank.clone()
    other[-1] = 1
    assert run.name_of([("w", blank)]) == run.name_of([("w", blank.clone())]) != run.name_of([("w", other)])
