"""Power posteriors of a real model on arithmetic and GSM8K: what each method reaches at about equal passes."""

from __future__ import annotations

import json
import math
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Policy, Support, Target, default_lora, tempered
from amortlm.diagnostics.bounds import log_z_bounds
from amortlm.environment import environment
from amortlm.inference.blocks import blockwise_metropolis_hastings
from amortlm.inference.correct import weigh
from amortlm.inference.mcmc import Chains, metropolis_hastings
from amortlm.inference.smc import smc
from amortlm.lab.tasks import arithmetic
from amortlm.types import Row

POWER = 4  # as published
DRAWS = 8  # completions of one output of best-of-n, SIR and SMC
OUTPUTS = 2  # of each method for a question
STEPS = 14  # of a chain: each redraws half a completion on average
BLOCKS, BLOCK_STEPS = 4, 3
LEVEL = 0.95
METHODS = {  # the words of a table -> whose draws
    "base": "base",
    "low temperature": "low",
    "best-of-8": "low",
    "SIR": "low",
    "SMC": "low",
    "MH": "low",
    "blocks": "low",
    "amortised": "trained",
    "amortised + SIR": "trained",
}
Output = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Questions with a final answer. updates of `prompts` prompts x 4 completions."""

    prompt: str
    support: Support
    test: list[Row]
    train: list[Row]
    updates: int
    prompts: int


def tasks(lm: LanguageModel, data: Path) -> dict[str, Task]:
    sums = arithmetic.questions(46, [3, 4], "power")
    end = str(lm.tokenizer.eos_token)
    return {
        "arithmetic": Task(
            arithmetic.PROMPT, Support(stop=".", min_tokens=1, max_tokens=40), sums[:6], sums[6:], 10, 2
        ),
        "gsm8k": Task(
            "Question: {x}\nAnswer:",
            Support(stop=end, min_tokens=1, max_tokens=128),
            gsm8k(data / "test.jsonl", 3),
            gsm8k(data / "train.jsonl", 40),
            6,
            1,
        ),
    }


def gsm8k(file: Path, count: int) -> list[Row]:
    """Questions of at most 300 characters, chosen at random by a fixed seed, with their final answers."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    short = [r for r in records if len(r["question"]) <= 300]
    chosen = random.Random("power").sample(short, count)
    return [{"x": r["question"], "y": r["answer"].split("#### ")[-1].replace(",", "")} for r in chosen]


def is_right(text: str, row: Row) -> bool:
    """Is the last number of the text the answer?"""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return bool(numbers) and float(numbers[-1]) == float(row["y"])


class Measure:
    """All methods on one question. Tokens are counted per output: decoded, and judged by the target."""

    def __init__(self, target: Target, row: Row):
        self.target, self.row = target, row

    def outputs(
        self, rollouts: Any, log_r: torch.Tensor, policy: Policy, decoded: float, judged: float
    ) -> list[Output]:
        """An entry for each of the completions."""
        texts = [policy.lm.decode(z) for z in rollouts.completions()]
        return [
            {
                "text": text,
                "tokens": z,
                "log_p": log_r[i].item() / POWER,
                "right": is_right(text, self.row),
                "length": len(z),
                "decoded": decoded,
                "judged": judged,
            }
            for i, (text, z) in enumerate(zip(texts, rollouts.completions(), strict=True))
        ]

    def pooled(self, policy: Policy, names: dict[str, str]) -> dict[str, Any]:
        """Plain draws, best-of-n and SIR from one pool. names: "plain", "best" and "SIR" -> the method's name."""
        pool = weigh(policy, self.target, self.row, DRAWS * OUTPUTS, seed="power")
        tokens = float((pool.rollouts.lengths + 1).sum()) / OUTPUTS
        groups = torch.arange(DRAWS * OUTPUTS).view(OUTPUTS, DRAWS)
        generator = torch.Generator().manual_seed(0)
        chosen = {
            "plain": groups[:, 0],
            "best": groups[:, 0] + pool.log_reward[groups].argmax(1),
            "SIR": groups[:, 0]
            + pool.log_weights[groups].double().softmax(1).multinomial(1, generator=generator)[:, 0],
        }
        found: dict[str, Any] = {}
        for kind, name in names.items():
            index = chosen[kind]
            one = (pool.rollouts.lengths[index] + 1).double().mean().item()
            cost = (one, 0.0) if kind == "plain" else (tokens, tokens)
            found[name] = self.outputs(pool.rollouts.select(index), pool.log_reward[index], policy, *cost)
        own = {
            "log_z_lower": log_z_bounds(pool.log_weights, None, LEVEL).lower,
            "ess": pool.ess,
            "draws": len(groups) * DRAWS,
        }
        return found | {f"pool of {names['plain']}": own}

    def chain(self, chains: Chains, policy: Policy) -> list[Output]:
        length = (chains.rollouts.lengths + 1).double().mean().item()
        judged = chains.completions_scored / OUTPUTS * length  # of unfinished texts at most
        decoded = chains.tokens_decoded / OUTPUTS
        found = self.outputs(chains.rollouts, chains.log_reward, policy, decoded, judged)
        return [{**o, "acceptance": chains.acceptance_rate} for o in found]

    def low_temperature(self, policy: Policy) -> dict[str, Any]:
        return self.pooled(policy, {"plain": "low temperature", "best": "best-of-8", "SIR": "SIR"})

    def amortised(self, policy: Policy) -> dict[str, Any]:
        return self.pooled(policy, {"plain": "amortised", "SIR": "amortised + SIR"})

    def base(self, policy: Policy) -> dict[str, Any]:
        pool = weigh(policy, self.target, self.row, OUTPUTS, seed="power")
        tokens = (pool.rollouts.lengths + 1).double().mean().item()
        return {"base": self.outputs(pool.rollouts, pool.log_reward, policy, tokens, 0.0)}

    def mh(self, policy: Policy) -> dict[str, Any]:
        sizes: dict[str, Any] = {"num_chains": OUTPUTS, "num_steps": STEPS, "seed": "power"}
        return {"MH": self.chain(metropolis_hastings(policy, self.target, self.row, **sizes), policy)}

    def blocks(self, policy: Policy) -> dict[str, Any]:
        block = math.ceil(policy.support.max_tokens / BLOCKS)
        sizes: dict[str, Any] = {"num_chains": OUTPUTS, "block_tokens": block, "num_steps": BLOCK_STEPS}
        chains = blockwise_metropolis_hastings(policy, self.target, self.row, **sizes, seed="power")
        return {"blocks": self.chain(chains, policy)}

    def smc(self, policy: Policy) -> dict[str, Any]:
        found = []
        for seed in range(OUTPUTS):
            particles = smc(policy, self.target, self.row, num_particles=DRAWS, seed=("power", seed))
            one = particles.resample(1, seed)
            judged = particles.completions_scored * (particles.rollouts.lengths + 1).double().mean().item()
            log_r = self.target.score_final(one)
            found += self.outputs(one, log_r, policy, float(particles.tokens_decoded), judged)
        return {"SMC": found}


class Run:
    """Results by task and question, written after each method; what is there is not measured again."""

    def __init__(self, lm: LanguageModel, folder: Path, data: Path):
        self.lm, self.file, self.tasks = lm, folder / "results.json", tasks(lm, data)
        folder.mkdir(parents=True, exist_ok=True)
        self.adapters = folder / "work"  # not for git
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.record: dict[str, Any] = known or {"settings": settings(), "results": {}, "training": {}}

    def write(self) -> None:
        self.record["environment"] = environment()
        self.file.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")

    def all(self) -> None:
        for name, task in self.tasks.items():
            base = Policy(self.lm, task.prompt, task.support, default_lora(1)).prior
            low = tempered(base, 1 / POWER)
            self.questions(name, "SIR", low, Measure.low_temperature)
            self.questions(name, "MH", low, Measure.mh)
            self.questions(name, "blocks", low, Measure.blocks)
            self.questions(name, "SMC", low, Measure.smc)
            self.questions(name, "base", base, Measure.base)
            self.questions(name, "amortised + SIR", self.trained(name, task), Measure.amortised)

    def questions(
        self, name: str, method: str, policy: Policy, measure: Callable[[Measure, Policy], dict[str, Any]]
    ) -> None:
        """method: a name that the results of `measure` contain."""
        task = self.tasks[name]
        target = POWER * self.lm.log_prob("{z}", given=task.prompt)
        for row in task.test:
            found = self.record["results"].setdefault(name, {}).setdefault(row["x"], {})
            if method not in found:
                found.update(measure(Measure(target, row), policy))
                self.write()
                print(name, method, row["x"][:40], flush=True)

    def trained(self, name: str, task: Task) -> Policy:
        """q, from p itself (from p at temperature 1 / a modes are missing), trained on other questions by VarGrad, kept
        beside the results."""
        target, folder = POWER * self.lm.log_prob("{z}", given=task.prompt), self.adapters / name
        kept = folder.is_dir()
        with tempfile.TemporaryDirectory() as work:
            trainer = GFNTrainer(
                self.lm,
                target=target,
                prompt=task.prompt,
                support=task.support,
                train_dataset=task.train,
                args=config(work, task),
                adapter=folder if kept else 8,
            )
            if not kept:
                counter = count_tokens(trainer)
                trainer.train()
                trainer.policy.save_adapter(folder)
                self.record["training"][name] = counter
                self.write()
        return trainer.policy


def config(folder: str, task: Task) -> GFNConfig:
    return GFNConfig(
        output_dir=folder,
        objective="vargrad",
        max_steps=task.updates,
        num_samples=4,
        per_device_train_batch_size=task.prompts,
        behaviour={"policy": 1.0},
        learning_rate=3e-4,
        warmup_steps=2,
        save_strategy="no",
        logging_strategy="no",
        diagnose_steps=0,
        disable_tqdm=True,
    )


def count_tokens(trainer: GFNTrainer) -> dict[str, float]:
    """Counts, while it trains, the tokens that were drawn; each is also judged, and passed forward and back once."""
    counter, collect = {"tokens": 0.0, "completions": 0.0}, trainer.source.collect

    def counted(rows: Any, step: Any) -> Any:
        experience = collect(rows, step)
        counter["tokens"] += float((experience.rollouts.lengths + 1).sum())
        counter["completions"] += len(experience.rollouts)
        return experience

    trainer.source.collect = counted  # type: ignore[method-assign]
    return counter


def settings() -> dict[str, Any]:
    return {
        "power": POWER,
        "draws": DRAWS,
        "outputs": OUTPUTS,
        "steps": STEPS,
        "blocks": BLOCKS,
        "block_steps": BLOCK_STEPS,
        "level": LEVEL,
    }
