"""The experiment on random integers: equal budgets, the reward, the gold samples, and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amortlm.cli import main
from amortlm.errors import ConfigError
from amortlm.lab import runner
from amortlm.lab.experiment import Context
from amortlm.lab.experiments import numbers
from amortlm.lab.overrides import flat
from amortlm.language_model import LanguageModel
from amortlm.posterior import Posterior
from amortlm.train import GFNTrainer

EXPERIMENT = numbers.EXPERIMENT
STEPS, SAMPLES = 2, 4


def context(lm: LanguageModel, folder: Path = Path()) -> Context:
    settings = {**EXPERIMENT.presets["smoke"], "steps": STEPS, "num_samples": SAMPLES, "adapter": 2}
    return Context(settings, lm, EXPERIMENT.prepare(settings, lm, None), folder=folder)


def test_presets_state_the_same_settings() -> None:
    names = {preset: set(dict(flat(settings))) for preset, settings in EXPERIMENT.presets.items()}
    assert names["smoke"] == names["small"] == names["paper"]
    assert EXPERIMENT.presets["paper"]["adapter"] == 512
    assert EXPERIMENT.presets["paper"]["max_tokens"] == 5


@pytest.mark.parametrize("method", ["ppo", "grpo", "gflownet-subtb", "gflownet-tb", "gflownet-vargrad"])
def test_trained_methods_judge_equally_many_completions(
    method: str, embedded: LanguageModel, tmp_path: Path
) -> None:
    if method == "grpo":
        pytest.importorskip("trl")
    trained = EXPERIMENT.methods[method](context(embedded, tmp_path))
    assert trained.reward_evaluations == STEPS * SAMPLES
    before = EXPERIMENT.methods["untrained"](context(embedded, tmp_path))
    outcomes = [EXPERIMENT.evaluate(context(embedded), t) for t in (before, trained)]
    assert outcomes[0].metrics != outcomes[1].metrics, "two steps have moved it"
    assert sum(outcomes[1].details["probs"]) == pytest.approx(outcomes[1].metrics["valid"])


def test_no_training_is_the_model_itself(embedded: LanguageModel, tmp_path: Path) -> None:
    """Figures of README.md for the model before training."""
    trained = EXPERIMENT.methods["untrained"](context(embedded, tmp_path))
    metrics = EXPERIMENT.evaluate(context(embedded), trained).metrics
    assert metrics == pytest.approx({"valid": 0.6269, "kl": 1.6244, "tv": 0.7266}, abs=1e-4)
    assert trained.reward_evaluations == 0


def test_the_reward_of_reinforcement_learning(embedded: LanguageModel, tmp_path: Path) -> None:
    posterior: Posterior = EXPERIMENT.methods["untrained"](context(embedded, tmp_path)).sampler
    texts = [" 0", " 42", " 100", " 101", " 07", "7", " cat"]
    rollouts = posterior.policy.rollouts([{}], [texts])
    reward = numbers.validity(context(embedded).data.target)
    assert reward(rollouts).tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_gold_integers() -> None:
    drawn = numbers.uniform_integers(5000, 0)
    assert set(drawn) == {f" {n}" for n in range(101)}
    assert drawn == numbers.uniform_integers(5000, 0)
    assert drawn != numbers.uniform_integers(5000, 1)


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_every_preset_builds_on_the_embedded_model(
    preset: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    out = tmp_path / "out"
    argv = ["reproduce", "numbers", "--preset", preset, "--model", "embedded", "--dry-run"]
    assert main([*argv, "--output", str(out)]) == 0
    printed, err = capfd.readouterr()
    assert printed.splitlines() == [f"{method}: ok" for method in EXPERIMENT.methods]
    assert err == ""
    assert not out.exists()


def test_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out --data"):
        runner.make_plan(EXPERIMENT, "smoke", tmp_path, data=Path("rows.csv"))


def test_the_figure_is_the_same_bytes_for_the_same_results(tmp_path: Path) -> None:
    """Also with one method only, and a divergence that is not finite."""
    run = {"metrics": {"valid": 0.5, "kl": None, "tv": 0.6}, "details": {"probs": [0.0] * 100 + [0.5]}}
    images = []
    for i, methods in enumerate((["sft"], ["sft"], list(EXPERIMENT.methods))):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert numbers.figures({"runs": {m: [run] for m in methods}}, folder) == ["histograms.png"]
        images.append((folder / "histograms.png").read_bytes())
    assert images[0] == images[1] != images[2]
    assert b"Software" not in images[0]
    assert len(images[2]) < 200_000


def test_an_interrupted_gflownet_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short in its third step, after the checkpoint of the second; ends where the uninterrupted run ends."""
    options: dict[str, Any] = {
        "methods": ["gflownet-tb"],
        "overrides": {"num_samples": str(SAMPLES), "adapter": "2"},
    }
    whole = runner.execute(runner.make_plan(EXPERIMENT, "smoke", tmp_path / "whole", **options), _silent)
    plan = runner.make_plan(EXPERIMENT, "smoke", tmp_path / "cut", **options)
    compute_loss, steps = GFNTrainer.compute_loss, []

    def interrupted(self: GFNTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and 2 not in steps:
            steps.append(2)
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(GFNTrainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.execute(plan, _silent)
    rest = runner.execute(plan, _silent)
    assert steps == [0, 1, 2, 2]
    (one,), (other,) = whole["runs"]["gflownet-tb"], rest["runs"]["gflownet-tb"]
    assert (one["resumed"], other["resumed"]) == (False, True)
    assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-6)


def _silent(line: str) -> None:
    pass
