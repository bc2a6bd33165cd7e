"""Training with completions drawn by a server: the server's own code on a stand-in for vLLM (tests/helpers/fake_vllm).

The objectives take log q from the trainer, so old weights on the server do not move their optimum: the test below
trains with weights that lag behind by four updates. Its control is a server that draws from a law without full support.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
from trainers import ROWS, make_trainer
from transformers import TrainerCallback

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Policy, Support
from amortlm.engine.adapter import default_lora
from amortlm.errors import ConfigError, RolloutError
from amortlm.rollout import sampler
from amortlm.rollout.ahead import Ahead
from amortlm.rollout.connection import Patience

SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "behaviour": {"replay": 0.25, "tempered": 0.25, "corrected": 0.25},
    "epsilon": 0.1,
}
LAGGING: dict[str, Any] = {"max_staleness": 2, "max_steps": 7}
ROUNDING = 1e-4  # of weights after four updates: the stand-in makes no packs, and so rounds otherwise


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "Patience", lambda: Patience(request=60, outage=0.3, pause=0.05))


@contextmanager
def serving(lm: LanguageModel, folder: Path, merged: bool = False) -> Iterator[tuple[str, fake_vllm.Engine]]:
    policy = Policy(lm, "{x}", Support(stop=".", max_tokens=3), default_lora(4))
    with fake_vllm.serving(policy, folder / "server", merged=merged) as found:
        yield found


def difference(a: GFNTrainer, b: GFNTrainer) -> float:
    theirs = b.policy.weights()
    return max((w - theirs[name]).abs().max().item() for name, w in a.policy.weights().items())


def logged(trainer: GFNTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.slow
def test_training_is_that_of_local_draws(one_lm: LanguageModel, tmp_path: Path) -> None:
    local = make_trainer(one_lm, tmp_path / "local", **SETTINGS)
    start = make_trainer(one_lm, tmp_path / "start", **SETTINGS)
    local.train()
    with serving(one_lm, tmp_path) as (url, engine):
        remote = make_trainer(one_lm, tmp_path / "remote", rollout=url, **SETTINGS)
        remote.train()
    assert len(engine.used) == 3, "new weights for each update but the second: the first one had rate 0"
    assert difference(remote, local) < ROUNDING < difference(local, start) / 10
    assert max(logged(remote, "sampler_mismatch_max")) < 1e-4
    assert max(logged(remote, "sampler_mismatch_share")) == 0


def test_weights_may_lag_behind(one_lm: LanguageModel, tmp_path: Path) -> None:
    versions = []
    with serving(one_lm, tmp_path) as (url, engine):
        trainer = make_trainer(one_lm, tmp_path / "run", rollout=url, behaviour={"policy": 1.0}, **LAGGING)
        collect = trainer.source.collect

        def noting(*args: Any) -> Any:
            found = collect(*args)
            versions.append(found.version)
            return found

        trainer.source.collect = noting  # type: ignore[method-assign]
        trainer.train()
    assert versions == [0, 0, 0, 1, 2, 3, 4]
    assert len(engine.used) == 6, "new weights for each update but the second: the first one had rate 0"
    off = logged(trainer, "sampler_mismatch")
    assert max(off[:2]) < 1e-4 < min(off[3:])
    assert logged(trainer, "staleness") == [0, 1, 2, 2, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 2])
def test_merged_weights_train_as_local_draws_do(one_lm: LanguageModel, tmp_path: Path, lag: int) -> None:
    """A full copy, which no server takes as an adapter: as local draws if they are new, and never of two versions."""
    settings = SETTINGS | {"adapter": "full", "behaviour": {"tempered": 0.25}}
    local = make_trainer(one_lm, tmp_path / "local", **settings)
    start = local.policy.weights()
    local.train()
    with serving(one_lm, tmp_path, merged=True) as (url, engine):
        remote = make_trainer(one_lm, tmp_path / "remote", rollout=url, max_staleness=lag, **settings)
        remote.train()
    assert engine.loads >= 3
    apart = max((w - start[name]).abs().max().item() for name, w in local.policy.weights().items())
    assert (difference(remote, local) < ROUNDING) == (lag == 0)
    assert apart > 10 * ROUNDING, "control"
    assert max(logged(remote, "sampler_mismatch_max")[:2]) < 1e-4, "the first rate is 0"


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["adapters", "merged"])
@pytest.mark.parametrize("objective", ["subtb", "vargrad"])
def test_old_weights_do_not_move_the_optimum(
    one_lm: LanguageModel, tmp_path: Path, objective: str, merged: bool
) -> None:
    """From a total variation above .5 to one below .1, exact."""
    words = Support(stop=".", min_tokens=1, max_tokens=2, allowed_tokens=[" a", " the", " cat", " dog", "b"])
    with serving(one_lm, tmp_path, merged) as (url, _):
        trainer = make_trainer(
            one_lm,
            tmp_path / "run",
            objective=objective,
            target=one_lm.log_prob("{z}{y}", given="{x}") * 2.0,
            support=words,
            rows=ROWS[:2],
            max_steps=80,
            num_samples=32,
            warmup_steps=5,
            epsilon=0.1,
            rollout=url,
            max_staleness=4,
        )
        before = trainer.posterior.diagnose(ROWS[:2], 32).mean("total_variation")
        trainer.train()
    assert max(logged(trainer, "staleness")) == 4
    assert before > 0.5
    assert trainer.posterior.diagnose(ROWS[:2], 32).mean("total_variation") < 0.1


@pytest.mark.slow
def test_a_server_that_dies_costs_nothing(one_lm: LanguageModel, tmp_path: Path) -> None:
    local = make_trainer(one_lm, tmp_path / "local", **SETTINGS)
    local.train()
    with serving(one_lm, tmp_path / "first") as (url, _):
        trainer = make_trainer(one_lm, tmp_path / "run", rollout=url, **SETTINGS)
        collect = trainer.source.collect

        def until_the_third(rows: Any, step: Any) -> Any:
            if step[0] == 2:
                raise RolloutError("it is gone")
            return collect(rows, step)

        trainer.source.collect = until_the_third  # type: ignore[method-assign]
        with pytest.raises(RolloutError, match=r"it is gone. Saved checkpoint-2: .*--resume"):
            trainer.train()
    with serving(one_lm, tmp_path / "second") as (url, _):
        resumed = make_trainer(one_lm, tmp_path / "run", rollout=url, **SETTINGS)
        resumed.train(resume_from_checkpoint=True)
    assert difference(resumed, local) < ROUNDING


@pytest.mark.slow
def test_draws_that_were_asked_for_ahead_are_saved_and_used(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is cut after its third update goes on, with another server, to the weights of the whole one, although
    its completions come from older weights."""
    settings = SETTINGS | {"max_steps": 8, "max_staleness": 3}
    with serving(one_lm, tmp_path / "first") as (url, _):
        whole = make_trainer(one_lm, tmp_path / "whole", rollout=url, **settings)
        whole.train()
        cut = make_trainer(one_lm, tmp_path / "cut", rollout=url, **settings)
        cut.add_callback(Stop(at=3))
        with pytest.raises(RolloutError, match="Saved checkpoint-3"):
            cut.train()
    shutil.copytree(tmp_path / "cut", tmp_path / "control")
    with serving(one_lm, tmp_path / "second") as (url, _):
        resumed = make_trainer(one_lm, tmp_path / "cut", rollout=url, **settings)
        resumed.train(resume_from_checkpoint=True)
        without = make_trainer(one_lm, tmp_path / "control", rollout=url, **settings)
        monkeypatch.setattr(Ahead, "load", lambda *_: None)
        without.train(resume_from_checkpoint=True)
    assert max(logged(whole, "staleness")) == 3
    assert logged(resumed, "staleness") == logged(whole, "staleness")
    assert difference(resumed, whole) < ROUNDING < difference(without, whole)


class Stop(TrainerCallback):
    """As a server that fails."""

    def __init__(self, at: int):
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise RolloutError("it is gone")


def test_a_server_that_is_gone_is_given_up(one_lm: LanguageModel, tmp_path: Path) -> None:
    with serving(one_lm, tmp_path) as (url, _):
        trainer = make_trainer(one_lm, tmp_path / "run", rollout=url, **SETTINGS)
    with pytest.raises(RolloutError, match="cannot be reached"):
        trainer.train()
    with pytest.raises(RolloutError, match="cannot be reached"):
        make_trainer(one_lm, tmp_path / "other", rollout=url)


def test_a_server_that_loses_weights_is_found_at_the_next_update(
    one_lm: LanguageModel, tmp_path: Path
) -> None:
    with serving(one_lm, tmp_path) as (url, engine):
        trainer = make_trainer(one_lm, tmp_path / "run", rollout=url, learning_rate=0.1)
        engine.lost = True
        with pytest.raises(RolloutError, match="without the weights"):
            trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_staleness": 1}, "for a server"),
        ({"max_staleness": -1, "rollout": "http://127.0.0.1:1"}, "0 or more"),
        ({"max_staleness": 1, "rollout": "http://127.0.0.1:1", "objective": "forward_kl"}, "max_staleness=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        GFNConfig(output_dir=str(tmp_path), **settings)
