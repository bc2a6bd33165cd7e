"""Expectation maximisation: fit p to data (x, y) through a latent z that the data do not have.

The E-step trains q(z | x, y) to sample the posterior of p. The M-step maximises the importance-weighted mean of
log p(z y | x) over z from q. By Fisher's identity its gradient estimates the gradient of log p(y | x). Hu et al. 2024,
section 3.2.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed

from amortlm.data import as_rows
from amortlm.engine.adapter import FULL, load_weights, save_weights, trainable_copy
from amortlm.engine.passes import Passes
from amortlm.engine.prefix import pad_right
from amortlm.errors import ConfigError, TrainingError
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.posterior import Posterior
from amortlm.seeds import seed_of
from amortlm.support import Support
from amortlm.targets.base import Target
from amortlm.targets.lm import LogProb
from amortlm.text.template import Messages
from amortlm.train import GFNConfig, GFNTrainer, run, sharding
from amortlm.train.renamed import refuse_keywords
from amortlm.types import Rollouts, Row

if TYPE_CHECKING:
    from peft import LoraConfig

DONE = "m_step.json"


@dataclass(frozen=True)
class MStep:
    """Settings of an M-step.

    steps          updates of p
    learning_rate  of AdamW
    batch_size     rows per update
    num_samples    latents drawn from q for each row
    weighted       weight the latents of a row by p(z y | x) / q(z), so that the gradient is right even if q is not yet
                   the posterior; False: equal weights
    """

    steps: int = 100
    learning_rate: float = 1e-4
    batch_size: int = 8
    num_samples: int = 8
    weighted: bool = True


class EM:
    """Alternate E-steps (`GFNTrainer`) and M-steps. Each round continues with the policy and the model of the round
    before it.

    target              one `log_prob` with `{z}`: `lm.log_prob("{z} The answer is {y}.", given="{x}")`
    args                settings of an E-step; its output_dir gets `round-0`, `round-1`, ... with `q` and `p` inside
    rounds              number of rounds (E-step and M-step)
    adapter, p_adapter  the adapter that is trained in q (E-step) and in p (M-step), as in `GFNTrainer`
    gold                initial completions of the replay buffer: a list per row

    Finished rounds of an interrupted run are loaded, not run again. Raises ConfigError for another kind of target,
    CheckpointError for a folder with rounds of another run.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        target: Target,
        prompt: str | Messages,
        support: Support,
        train_dataset: Sequence[Row],
        args: GFNConfig,
        m_step: MStep | None = None,
        rounds: int = 1,
        adapter: LoraConfig | int | str | Path | None = None,
        p_adapter: LoraConfig | int | str | Path | None = None,
        gold: Sequence[Sequence[str | list[int]]] | None = None,
        **kwargs: Any,
    ):
        refuse_keywords(kwargs, {"peft_config": "adapter", "seeds": "gold"})
        if kwargs:
            raise ConfigError(f"EM takes no {next(iter(kwargs))}")
        if sharding.is_asked(args):
            raise ConfigError(
                "EM changes p, which cannot be sharded meanwhile: leave fsdp out, or train without EM"
            )
        self.term = _single_term(target)
        self.temperature = 1.0 / target.terms[0][0]
        self.lm, self.prompt, self.support = lm, prompt, support
        self.rows = as_rows(train_dataset, "train_dataset")
        self.args, self.m_step, self.rounds, self.gold = args, m_step or MStep(), rounds, gold
        if rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {rounds}")
        if adapter == FULL and rounds > 1:
            raise ConfigError(
                "a full copy as q cannot continue from the round before; give a LoraConfig, or rounds=1"
            )
        self.q_adapter, self.is_full = adapter, p_adapter == FULL
        set_seed(args.seed)  # the initial weights of an adapter are random
        copied = trainable_copy(lm, p_adapter)
        self._trained = [p for p in copied.parameters() if p.requires_grad]
        self._start = [p.detach().clone() for p in self._trained]
        # The current p. At first it equals `lm`, in another module tree.
        self.model = lm.with_model(copied)

    def run(self) -> Posterior:
        """Run all rounds. The returned posterior samples from q and scores with the fitted p (`em.model`)."""
        folder = Path(str(self.args.output_dir))
        for p, start in zip(self._trained, self._start, strict=True):
            p.data.copy_(start)  # undoes an interrupted M-step
        self._claim(folder)
        q = self.q_adapter
        for number in range(self.rounds):
            here = folder / f"round-{number}"
            if not (here / DONE).exists():
                posterior = self._e_step(here / "q", q, number)
                losses = fit(
                    self.model.passes,
                    self.term,
                    posterior,
                    self.rows,
                    self._trained,
                    self.m_step,
                    (self.args.seed, number),
                )
                save_weights(self.model.model, here / "p")
                (here / DONE).write_text(json.dumps({"loss": losses}), encoding="utf-8")
            q = str(here / "q")
        load_weights(self.model.model, self.is_full, here / "p")
        return Posterior.from_pretrained(here / "q", lm=self.lm, target=self._target())

    def _claim(self, folder: Path) -> None:
        """Raise CheckpointError if the folder holds rounds of another run (the number of rounds does not count);
        otherwise write the identity of this run."""
        policy = Policy(self.lm, self.prompt, self.support, self.q_adapter)
        stated = run.identity(policy, self._target(), self.rows, self.args, gold=self.gold)
        stated |= {
            "m_step": asdict(self.m_step),
            "p": run.stated_adapter(self.model.model, self.is_full),
        }
        if any(folder.glob("round-*")):
            run.check(folder, run.as_json(stated))
        run.write(folder, run.as_json(stated))

    def _target(self) -> Target:
        return LogProb(self.model, self.term.of.text, self.term.given.source) / self.temperature

    def _e_step(self, folder: Path, q: Any, number: int) -> Posterior:
        """Train q, starting from the adapter `q`, on the p of the round before."""
        if number:
            load_weights(self.model.model, self.is_full, folder.parents[1] / f"round-{number - 1}" / "p")
        args = copy.copy(self.args)
        args.output_dir, args.seed = str(folder), self.args.seed + number
        trainer = GFNTrainer(
            self.lm,
            target=self._target(),
            prompt=self.prompt,
            support=self.support,
            train_dataset=self.rows,
            args=args,
            adapter=q,
            gold=self.gold,
        )
        found = run.can_resume(folder)
        trainer.train(resume_from_checkpoint=found, overwrite_output_dir=not found)
        return trainer.posterior


def fit(
    passes: Passes,
    term: LogProb,
    posterior: Posterior,
    rows: Sequence[Row],
    parameters: Sequence[torch.nn.Parameter],
    config: MStep,
    seed: object,
) -> list[float]:
    """The M-step: maximise log p(z y | x) of a model over `parameters`, with z from the posterior's policy.

    Returns the loss of each step: minus the weighted mean of log p(z y | x), nats. Raises TrainingError for a loss that
    is not finite.
    """
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    losses = []
    for step in tqdm(range(config.steps), desc="M-step", disable=None):
        batch = _batch(rows, config.batch_size, (seed, step))
        rollouts, log_q = posterior.policy.sample(batch, config.num_samples, seed=(seed, step))
        log_p = joint_log_prob(passes, term, rollouts)
        weight = posterior_weights(log_p.detach(), log_q.final(rollouts.lengths), rollouts.row_index)
        if not config.weighted:
            weight = torch.full_like(weight, 1.0 / config.num_samples)
        loss = -(weight * log_p).sum() / len(batch)
        if not torch.isfinite(loss):
            raise TrainingError(f"the M-step's loss is {loss.item()} at step {step}: lower its learning_rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    for p in parameters:
        p.requires_grad_(False)
    return losses


def posterior_weights(log_p: Tensor, log_q: Tensor, group: Tensor) -> Tensor:
    """[B] importance weights p(z y | x) / q(z), normalised within each group (row). log_p, log_q [B] nats."""
    log_w = log_p - log_q
    out = torch.empty_like(log_w)
    for g in group.unique():
        out[group == g] = log_w[group == g].softmax(0)
    return out


def joint_log_prob(passes: Passes, term: LogProb, rollouts: Rollouts) -> Tensor:
    """[B] log p(z y | x) of finished completions, nats, differentiable in the model of `passes`.

    It includes only the stop symbol that was written (a target sums over several). Tokens of a tool have probability 1.
    """
    sequences, scored = [], []
    contexts = [term.context(row) for row in rollouts.rows]
    chosen = rollouts.action_mask.tolist()
    for b, tokens in enumerate(rollouts.completions()):
        c = contexts[int(rollouts.row_index[b])]
        written = [*tokens, int(rollouts.stops[b])]
        sequences.append([*c.before, *written, *c.after])
        before, after = len(c.before) - c.before_scored, len(c.after) - c.after_scored
        own = [*chosen[b][: len(tokens)], True]
        scored.append([0] * before + [1] * c.before_scored + own + [0] * after + [1] * c.after_scored)
    log_p = passes.log_probs(sequences)
    counts = pad_right(scored, log_p.device)[0][:, 1:].bool()
    return torch.where(counts, log_p, 0.0).sum(1)


def _batch(rows: Sequence[Row], size: int, seed: object) -> list[Row]:
    generator = torch.Generator().manual_seed(seed_of(seed))
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:size].tolist()]


def _single_term(target: Target) -> LogProb:
    terms = target.terms
    if len(terms) != 1 or not isinstance(terms[0][1], LogProb) or not terms[0][1].of.has_latent:
        raise ConfigError(f"EM needs a target that is one log_prob of `{{z}}`, not {target!r}")
    if terms[0][0] <= 0:
        raise ConfigError("EM needs a log_prob with a positive weight (the inverse of a temperature)")
    return terms[0][1]
