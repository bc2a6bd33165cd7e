"""What `speed.py` measures: one update as the trainer makes it, its bare passes, the paper's procedure, `generate`."""

from __future__ import annotations

import functools
import random
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
)

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Rollouts, Support
from amortlm.engine.prefix import pad_left, select_cache
from amortlm.lab.tasks.infilling import STORIES
from amortlm.language_model import EMBEDDED_PATH

from . import paper_loop
from .paper_loop import CACHE

PHASES = {  # owner, attribute -> phase
    ("source", "draw"): "sampling",
    ("training_target", "score"): "reference scoring",
    ("buffer", "add"): "buffer",
    ("policy", "evaluate"): "policy forward",
    ("accelerator", "backward"): "policy backward",
    ("", "_objective"): "objective",
}
TASKS = ("continuation", "infilling")
BRANCH_WIDTH = 64  # tokens of a bare pass over branches


@dataclass(frozen=True)
class Case:
    """One update to measure. context, suffix: tokens of x and y (None: as the stories have them); states: stopping
    states trained on."""

    task: str = "continuation"
    model: str = "embedded"
    prompts: int = 4
    samples: int = 8
    tokens: int = 20
    context: int | None = None
    suffix: int | None = None
    states: int | None = None
    full_length: bool = False  # a stop symbol that models do not write: every completion has `tokens` tokens
    rank: int = 16
    device: str = "cpu"
    dtype: str = "float32"


@functools.cache
def load(name: str, device: str, dtype: str) -> LanguageModel:
    if name != "gpt2-small":
        return LanguageModel.from_pretrained(name, device=device, dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None))
    # Any tokenizer serves random weights: the passes have GPT-2's vocabulary whatever the words are.
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_PATH)
    return LanguageModel(model.to(device, getattr(torch, dtype)), tokenizer, name=name)


def new_trainer(case: Case, folder: str, rows: int, **settings: Any) -> GFNTrainer:
    """A trainer on so many rows; `settings` go to GFNConfig."""
    lm = load(case.model, case.device, case.dtype)
    infilling = case.task == "infilling"
    config = GFNConfig(
        output_dir=folder,
        per_device_train_batch_size=case.prompts,
        num_samples=case.samples,
        objective={"subtb": {"states": case.states}},
        save_strategy="no",
        diagnose_steps=0,
        use_cpu=case.device == "cpu",
        **settings,
    )
    return GFNTrainer(
        lm,
        target=lm.log_prob("{z} {y}", given="{x}") if infilling else lm.log_prob("{z}", given="{x}") / 0.8,
        prompt="{y} {x}" if infilling else "{x}",
        support=Support(
            stop=len(lm.tokenizer) - 1 if case.full_length else ".", min_tokens=3, max_tokens=case.tokens
        ),
        train_dataset=_rows(case, lm, rows),
        args=config,
        adapter=case.rank,
    )


def build(case: Case, folder: str) -> GFNTrainer:
    """A trainer whose policy differs from the model, and stays as it is: the learning rate is 0."""
    settings = {"learning_rate": 0.0, "behaviour": {"policy": 1.0}, "max_steps": 10**6}
    trainer = new_trainer(case, folder, case.prompts, **settings)
    generator = torch.Generator().manual_seed(0)
    for name, p in trainer.policy.named_parameters():
        if "lora_B" in name:
            p.data = (torch.randn(p.shape, generator=generator) * 0.02).to(p)
    trainer.create_optimizer_and_scheduler(10**6)
    trainer.current_gradient_accumulation_steps = 1
    trainer._next_micro_step = lambda: (0, 0)  # type: ignore[method-assign]  # the same completions every time
    return trainer


def _rows(case: Case, lm: LanguageModel, count: int) -> list[dict[str, str]]:
    rows = [{"x": r["x"], "y": r["y"]} for r in STORIES[:count]]
    assert len(rows) == count, f"at most {len(STORIES)} prompts"
    text = lm.encode_continuation(" ".join(r["x"] for r in STORIES[:8]))
    for i, row in enumerate(rows):
        for column, tokens in (("x", case.context), ("y", case.suffix)):
            if tokens is not None:
                row[column] = lm.decode(text[i : i + tokens])
    return rows


class Update:
    """One whole update as the trainer makes it, with the seconds of its phases; nothing is known of its completions."""

    def __init__(self, trainer: GFNTrainer):
        self.trainer, self.rows = trainer, list(trainer.train_dataset)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._now: dict[str, float] = {}
        for (owner, name), phase in PHASES.items():
            self._watch(getattr(trainer, owner) if owner else trainer, name, phase)

    def _watch(self, owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._phase(phase):
                return original(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def _phase(self, phase: str) -> Any:
        start = clock()
        yield
        self._now[phase] = self._now.get(phase, 0.0) + clock() - start

    def __call__(self) -> None:
        self._now = {}
        self.trainer.training_target.clear()
        start = clock()
        self.trainer.training_step(self.trainer.policy, {"rows": self.rows})
        with self._phase("optimiser"):
            apply_gradient(self.trainer)
        total = clock() - start
        self._now["rest"] = total - sum(self._now.values())
        for phase, seconds in self._now.items():
            self.seconds[phase].append(seconds)


class Training(TrainerCallback):
    """A real run: seconds of each update, and how many stopping states its target was asked about.

    forget: the rewards of earlier updates are not remembered.
    """

    def __init__(self, trainer: GFNTrainer, forget: bool):
        self.trainer, self.forget, self.started = trainer, forget, 0.0
        self.seconds: list[float] = []
        self.asked: list[int] = []
        inner = trainer.training_target.target
        score = inner.score

        def counted(rollouts: Rollouts) -> Any:
            self.asked[-1] += int(rollouts.stop_mask.sum())
            return score(rollouts)

        inner.score = counted  # type: ignore[method-assign]
        trainer.add_callback(self)
        trainer.train(overwrite_output_dir=True)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.forget:
            self.trainer.training_target.clear()
        self.asked.append(0)
        self.started = clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(clock() - self.started)

    def samples(self, seed: int) -> paper_loop.Batch:
        """What is trained on for a batch of prompts, at the end of the run."""
        size = self.trainer.args.per_device_train_batch_size
        rows = random.Random(seed).sample(self.trainer.train_dataset, size)
        return paper_batch(self.trainer, drawn(self.trainer, rows, (-1, seed)))


def drawn(trainer: GFNTrainer, rows: list[dict[str, str]], step: tuple[int, int]) -> Rollouts:
    """The completions of an update, not scored yet."""
    source = trainer.source
    return source.draw(rows, step, source.choices(rows, step))[0]


def apply_gradient(trainer: GFNTrainer) -> None:
    torch.nn.utils.clip_grad_norm_([p for p in trainer.policy.parameters() if p.requires_grad], 1.0)
    assert trainer.optimizer is not None
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


class BarePasses:
    """The model passes of one update, of the same shapes, and nothing else: no masks beyond padding, no
    log-probabilities, no choice of tokens. Prompts are encoded once for all their completions."""

    def __init__(self, trainer: GFNTrainer, rollouts: Rollouts):
        self.trainer, self.rollouts = trainer, rollouts
        self.prompts = trainer.policy.encode_rows(rollouts.rows)
        contexts = [trainer.target.terms[0][1].context(row) for row in rollouts.rows]  # type: ignore[attr-defined]
        self.before = [c.before for c in contexts]
        branch = torch.tensor([len(c.after) for c in contexts], device=rollouts.tokens.device)
        self.branch_tokens = int((branch[rollouts.row_index] * rollouts.stop_mask.sum(1)).sum())

    @torch.no_grad()
    def decode(self) -> None:
        model, rollouts = self.trainer.policy.model, self.rollouts
        prefix = self.trainer.policy.passes.encode(self.prompts)
        alive = torch.arange(len(rollouts), device=rollouts.tokens.device)
        cache = select_cache(prefix.cache, rollouts.row_index) or DynamicCache()
        mask, ids = prefix.mask[rollouts.row_index].long(), prefix.last[rollouts.row_index, None]
        for t in range(self.trainer.policy.support.max_tokens):  # the stop at max_tokens is sure
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            position = mask.sum(1, keepdim=True) - 1
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": position, CACHE: cache}
            model(**given, use_cache=True)
            going = (rollouts.lengths[alive] > t).nonzero().squeeze(1)
            if not len(going):
                break
            if len(going) < len(alive):
                cache.batch_select_indices(going)
                mask, alive = mask[going], alive[going]
            ids = rollouts.tokens[alive, t : t + 1]

    @torch.no_grad()
    def reference(self) -> None:
        model, rollouts = self.trainer.lm.model, self.rollouts
        passes = self.trainer.lm.passes
        cache = passes.states(passes.encode(self.before), rollouts.row_index, rollouts.tokens)[1]
        left = -(-self.branch_tokens // BRANCH_WIDTH)  # rows of branches, at most 32 in a pass
        while left:
            assert cache is not None
            rows = min(left, len(rollouts), 32)
            part = select_cache(cache, torch.arange(rows, device=rollouts.tokens.device))
            ids = torch.ones(rows, BRANCH_WIDTH, dtype=torch.long, device=rollouts.tokens.device)
            model(**{"input_ids": ids, CACHE: part})
            left -= rows

    def policy(self) -> None:
        passes, rollouts = self.trainer.policy.passes, self.rollouts
        logits = passes.state_logits(passes.encode(self.prompts), rollouts.row_index, rollouts.tokens)
        logits.backward(torch.full_like(logits, 1e-6))
        self.trainer.policy.zero_grad()

    def parts(self) -> dict[str, Callable[[], None]]:
        return {"bare decode": self.decode, "bare reference": self.reference, "bare policy": self.policy}


def paper_batch(trainer: GFNTrainer, rollouts: Rollouts) -> paper_loop.Batch:
    """The same trajectories as token lists."""
    weight, term = trainer.target.terms[0]
    group = rollouts.row_index.tolist()
    prompts = trainer.policy.encode_rows(rollouts.rows)
    contexts = [term.context(row) for row in rollouts.rows]  # type: ignore[attr-defined]
    support = trainer.policy.support
    return paper_loop.Batch(
        prompts=[prompts[g] for g in group],
        before=[contexts[g].before for g in group],
        after=[contexts[g].after for g in group],
        group=group,
        completions=rollouts.completions(),
        allowed=support.allowed.to(rollouts.tokens.device),
        stop=support.stop_ids[0],
        min_tokens=support.min_tokens,
        max_tokens=support.max_tokens,
        weight=weight,
    )


def paper_update(trainer: GFNTrainer, batch: paper_loop.Batch, pass_per_prefix: bool = True) -> None:
    paper_loop.loss(trainer.policy.model, trainer.lm.model, batch, pass_per_prefix).backward()
    apply_gradient(trainer)


def generate(trainer: GFNTrainer, rollouts: Rollouts) -> None:
    """The decoder of transformers for as many steps as the longest of our samples took."""
    support, model = trainer.policy.support, trainer.policy.model
    steps = min(int(rollouts.lengths.max()) + 1, support.max_tokens)
    ids, mask = pad_left(trainer.policy.encode_rows(rollouts.rows), rollouts.tokens.device)
    settings = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}
    config = GenerationConfig(
        **settings,
        min_new_tokens=steps,
        max_new_tokens=steps,
        num_return_sequences=len(rollouts) // len(rollouts.rows),
    )
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=config)


def clock() -> float:
    """Seconds, when the device is through with what it was given. On one CPU thread those of the process, not of the
    wall: what other processes take is not counted."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def full_rollouts(rows: list[Any], per_row: int, length: int, policy: Any = None) -> Rollouts:
    """Random completions of one length: on the policy's support, or (for the buffer alone) of 2,000 tokens."""
    count = len(rows) * per_row
    index = torch.arange(len(rows)).repeat_interleave(per_row)
    if policy is None:
        tokens, lengths = torch.randint(2000, (count, length)), torch.full((count,), length)
        everywhere = torch.ones(count, length + 1, dtype=torch.bool)
        return Rollouts(rows, index, tokens, lengths, lengths * 0, everywhere, everywhere[:, 1:], (0,))
    allowed = policy.support.allowed.nonzero().squeeze(1)
    drawn = allowed[torch.randint(len(allowed), (count, length))].view(len(rows), per_row, length)
    return policy.rollouts(rows, drawn.tolist())
