"""The self-check of a model: which kinds of passes give the log-probabilities of whole texts.

Sharing a prompt between completions, padding a batch, packing branches under one mask: each is exact for some
architectures and silently wrong for others (windows, relative biases, recurrent states, positions counted from
padding). So each is tried on two short texts of random tokens, and compared with plain passes of each text alone, with
no mask, cache or padding. A kind of pass that fails is not used. A model for which padded batches of whole texts fail,
or that is not causal, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amortlm.engine.packs import Sharing
from amortlm.engine.passes import Passes
from amortlm.engine.quantised import precision
from amortlm.errors import ModelError

# Nats by which correct passes may differ (order of sums, on random tokens). Parts of float64 models are in float32.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
# The same for a kind of pass that need not be used. In float32 correct ones differ by up to 7e-5 (30 layers), and steps
# of a Mamba layer that are computed another way by 2e-3.
OPTIONAL = {**TOLERANCE, torch.float32: 5e-4}
WINDOW = 4  # windows are narrowed to so many tokens, so that the short texts are longer than a window
WINDOWS = re.compile(r"(sliding|attention|attn|local)_?(window|chunk)\w*|window_size")
NONE = Sharing(steps=False, spans=False, packed=False)


@dataclass(frozen=True)
class Finding:
    """One comparison.

    what   the kind of pass
    error  the largest difference of log-probabilities, nats; None if the model raised an error
    exact  is the difference within the tolerance?
    note   the error, or the consequence
    """

    what: str
    error: float | None
    exact: bool
    note: str = ""


@dataclass(frozen=True)
class Exactness:
    """The result of the self-check: how prompts may be shared, and the comparisons behind it."""

    sharing: Sharing
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        lines = [
            f"{'exact' if f.exact else 'not exact':10} {_nats(f.error):>12}  {f.what} {f.note}".rstrip()
            for f in self.findings
        ]
        return "\n".join([*lines, "", *self.summary])

    @property
    def summary(self) -> list[str]:
        """The consequences for a user, one sentence each."""
        s, out = self.sharing, []
        if s.steps and s.spans:
            out.append("prompts are encoded once for all their completions" + _up_to(s.longest))
        elif s.steps:
            out.append(
                "sampling encodes a prompt once; scoring and training pass whole texts" + _up_to(s.longest)
            )
        else:
            out.append(
                "whole texts pass through the model, also at each step of sampling: exact, but slow for long texts"
            )
        if s.packed:
            out.append("text after {z} is scored for many prefixes in one pass" + _up_to(s.window))
        else:
            out.append("text after {z} is scored prefix by prefix")
        if s.switch is not None:
            out.append(
                f"texts may not cross {s.switch} tokens, where the rotary embedding of the whole text changes"
            )
        return out

    def to_dict(self) -> dict[str, Any]:
        return {"sharing": asdict(self.sharing), "findings": [asdict(f) for f in self.findings]}


@torch.no_grad()
def examine(model: Any, name: str) -> Exactness:
    """The self-check (module docstring) of a causal model in evaluation mode, on its device and in its dtype.

    Raises ModelError for a model that is not causal, or for which no kind of pass is exact.
    """
    check = Check(model, name)
    check.is_causal()
    check.in_batches()
    sharing = replace(
        NONE,
        steps=check.steps("a cached prompt, token by token"),
        spans=check.spans("a cached prompt, many tokens at once"),
        switch=rotary_switch(model.config),
    )
    if sharing.spans:
        sharing = replace(sharing, packed=check.packed())
    windows = attention_windows(model.config)
    if windows and (sharing.steps or sharing.spans):
        narrowest = min(windows.values())
        with _narrowed(model, windows):
            if not check.sees_change():
                check.findings.append(
                    Finding(
                        "windows could not be narrowed",
                        None,
                        True,
                        f"texts of more than {narrowest} tokens are passed whole",
                    )
                )
                sharing = replace(sharing, longest=narrowest)
            else:
                steps = sharing.steps and check.steps("the same beyond a window, token by token")
                spans = sharing.spans and check.spans("the same beyond a window, many tokens at once")
                if (steps, spans) != (sharing.steps, sharing.spans):
                    sharing = replace(sharing, longest=narrowest)
        sharing = replace(sharing, window=narrowest)
    return Exactness(sharing, tuple(check.findings))


class Check:
    """Comparisons on two texts: prompts of 1 and 9 tokens, completions of 6 tokens, and 3 tokens of text after z."""

    def __init__(self, model: Any, name: str):
        self.model, self.name = model, name
        self.tolerance = TOLERANCE.get(precision(model), 0.3)
        self.optional = OPTIONAL.get(precision(model), 0.3)
        self.findings: list[Finding] = []
        generator = torch.Generator().manual_seed(0)
        special = {t for t in _special(model.config) if t is not None}
        vocabulary = [t for t in range(min(512, _vocabulary(model))) if t not in special]
        pick = torch.randint(len(vocabulary), (2, 20), generator=generator).tolist()
        self.texts = [[vocabulary[i] for i in row] for row in pick]
        self.prompts = [self.texts[0][:1], self.texts[1][:9]]
        self.tokens = torch.tensor([self.texts[0][1:7], self.texts[1][9:15]], device=model.device)
        self.after = torch.tensor([self.texts[0][16:19], self.texts[1][16:19]], device=model.device)
        self.index = torch.arange(2, device=model.device)

    def alone(self, text: Sequence[int]) -> Tensor:
        """[len(text), V] log-probabilities after each token, by a plain pass of this text alone: the reference."""
        logits = self.model(
            input_ids=torch.tensor([list(text)], device=self.model.device), use_cache=False
        ).logits[0]
        return logits.float().log_softmax(-1)

    def is_causal(self) -> None:
        text, cut = self.texts[1], 12
        try:
            whole, again = self.alone(text), self.alone([*text[:cut], *reversed(text[cut:])])
            prefix = self.alone(text[:cut])
        except Exception as e:
            raise ModelError(
                f"{self.name}: a plain forward pass fails ({type(e).__name__}: {e}); give a causal LM "
                "that runs on input_ids alone"
            ) from e
        if not torch.isfinite(whole).any(-1).all() or torch.isnan(whole).any():
            raise ModelError(
                f"{self.name}: its log-probabilities are NaN; load it in another dtype, or with whole weights"
            )
        error = max((whole[:cut] - x[:cut]).abs().nan_to_num().max().item() for x in (again, prefix))
        self.findings.append(Finding("what comes later changes nothing", error, error <= self.tolerance))
        if error > self.tolerance:
            raise ModelError(
                f"{self.name}: its log-probabilities of a token change by up to {error:.2g} nats with the "
                "tokens that come after it, so it is not a causal LM (BERT-like models need is_decoder=True in their "
                "config); amortlm cannot sample from it left to right"
            )
        self.whole = [self.alone(text) for text in self.texts]

    def in_batches(self) -> None:
        passes = Passes(self.model, replace(NONE, switch=rotary_switch(self.model.config)))
        found = self.compare("a batch of whole texts", lambda: self._states(passes), self.tolerance)
        if not found:
            raise ModelError(
                f"{self.name}: its log-probabilities of a text depend on the other texts in the batch "
                f"({_nats(self.findings[-1].error)}); amortlm cannot compute with it"
            )

    def steps(self, what: str) -> bool:
        def run() -> list[tuple[Tensor, Tensor]]:
            writer = self._passes.write(self._passes.encode(self.prompts), self.index)
            out = [writer.logits()]
            for t in range(self.tokens.shape[1]):
                writer.append(self.index, self.tokens[:, t])
                out.append(writer.logits())
            return self.pairs(torch.stack(out, 1))

        return self.compare(what, run)

    def spans(self, what: str) -> bool:
        def run() -> list[tuple[Tensor, Tensor]]:
            pairs = self._states(self._passes)
            # Prompts of 1 and 3 tokens that go on by 4 and 6, and then by 2 each.
            prefix = self._passes.encode([text[:n] for text, n in zip(self.texts, (1, 3), strict=True)])
            more = [text[n : n + k] for text, n, k in zip(self.texts, (1, 3), (4, 6), strict=True)]
            last = torch.tensor([text[k : k + 2] for text, k in zip(self.texts, (5, 9), strict=True)])
            longer = self._passes.extend(prefix, self.index, more)
            logits = self._passes.state_logits(longer, self.index, last.to(self.index.device))
            return [*pairs, *((logits[b], self.whole[b][n - 1 : n + 2]) for b, n in enumerate((5, 9)))]

        return self.compare(what, run)

    def packed(self) -> bool:
        """Two branches for each text: after 1 and after 4 tokens of the completion."""

        def run() -> list[tuple[Tensor, Tensor]]:
            prefix = self._passes.encode(self.prompts)
            _, cache = self._passes.states(prefix, self.index, self.tokens)
            length, states = self.after.shape[1], torch.tensor([1, 4], device=self.after.device)
            state = states.repeat_interleave(length).expand(2, -1)
            offset = torch.arange(length, device=self.after.device).repeat(2)
            branch = torch.arange(2, device=self.after.device).repeat_interleave(length).expand(2, -1)
            allowed = branch_mask(prefix.mask, state, branch, self.tokens.shape[1] + 1)
            positions = prefix.mask.sum(1, keepdim=True) + 1 + state + offset
            assert cache is not None
            logits = self._passes.branch_logits(self.after.repeat(1, 2), positions, allowed, cache)
            pairs = []
            for b, prompt in enumerate(self.prompts):
                for k, t in enumerate((1, 4)):
                    text = [*prompt, *self.tokens[b, :t].tolist(), *self.after[b].tolist()]
                    pairs.append((logits[b, k * length : (k + 1) * length], self.alone(text)[-length:]))
            return pairs

        return self.compare("branches side by side under a mask", run)

    def sees_change(self) -> bool:
        """Do the narrowed windows change the log-probabilities of whole texts? The new ones become the reference."""
        before = self.whole
        try:
            self.whole = [self.alone(text) for text in self.texts]
        except Exception:  # the model has tables made for the old width
            return False
        pairs = zip(before, self.whole, strict=True)
        return max((a - b).abs().nan_to_num().max().item() for a, b in pairs) > self.tolerance

    @property
    def _passes(self) -> Passes:
        return Passes(self.model, Sharing())

    def _states(self, passes: Passes) -> list[tuple[Tensor, Tensor]]:
        return self.pairs(passes.state_logits(passes.encode(self.prompts), self.index, self.tokens))

    def pairs(self, logits: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs (logits of the states of a text, reference of that text), from logits [2, 7, V]."""
        firsts = [len(p) - 1 for p in self.prompts]
        return [
            (x, self.whole[b][first : first + 7])
            for b, (x, first) in enumerate(zip(logits, firsts, strict=True))
        ]

    def compare(
        self, what: str, run: Callable[[], list[tuple[Tensor, Tensor]]], tolerance: float | None = None
    ) -> bool:
        """Do all pairs agree within `tolerance` nats, by default that of a kind of pass that need not be used?"""
        tolerance = self.optional if tolerance is None else tolerance
        try:
            pairs = run()
        except Exception as e:  # models raise many types of errors for passes that they do not support
            self.findings.append(
                Finding(
                    what,
                    None,
                    False,
                    f"({type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''})",
                )
            )
            return False
        differences = [(found.float().log_softmax(-1) - want).abs() for found, want in pairs]
        # -inf on both sides is agreement; NaN is none.
        errors = [
            d.masked_fill(want.isneginf() & found.isneginf(), 0.0)
            for d, (found, want) in zip(differences, pairs, strict=True)
        ]
        error = max(e.nan_to_num(torch.inf, torch.inf).max().item() for e in errors)
        self.findings.append(Finding(what, error, error <= tolerance))
        return error <= tolerance


def branch_mask(past: Tensor, state: Tensor, branch: Tensor, n_states: int) -> Tensor:
    """[b, Q, P-1 + n_states + Q] bool: the keys that each token of packed branches sees: the prompt, z_1:t, and the
    tokens of its own branch up to itself.

    past [b, P-1] bool: the mask of the prompts. state, branch [b, Q]: state t and branch number of each token.
    """
    width = state.shape[1]
    seen = torch.arange(n_states, device=state.device) <= state[..., None]
    column = torch.arange(width, device=state.device)
    own = (branch[:, :, None] == branch[:, None, :]) & (column[:, None] >= column)
    return torch.cat([past[:, None].expand(-1, width, -1), seen, own], dim=2)


def attention_windows(config: Any) -> dict[str, int]:
    """The settings of a model that limit how far attention reaches, in tokens: windows, chunks."""
    settings = config.get_text_config(decoder=True).to_dict()
    return {
        k: v
        for k, v in settings.items()
        if WINDOWS.fullmatch(k) and isinstance(v, int) and not isinstance(v, bool) and v > 0
    }


def rotary_switch(config: Any) -> int | None:
    """The length in tokens at which LongRoPE changes the embedding of all positions; None without LongRoPE."""
    return min(_rope_lengths(config, "longrope"), default=None)


def rotary_limit(config: Any) -> int | None:
    """The length in tokens beyond which dynamic rotary embeddings change with the length of a text."""
    return min(_rope_lengths(config, "dynamic"), default=None)


def index_limit(config: Any) -> int | None:
    """The length in tokens beyond which an index picks the keys that attention sees (DSA, sparse attention).

    Its scores pass a ReLU, so that many are 0, and which of equal ones is picked depends on padding and rounding: the
    model gives no one log-probability of a longer text.
    """
    text = config.get_text_config(decoder=True)
    picked = getattr(text, "index_topk", None)
    rates = getattr(text, "compress_rates", None) or {}  # tokens to a key
    return picked and int(picked) * int(rates.get("compressed_sparse_attention", 1))


def _rope_lengths(config: Any, kind: str) -> list[int]:
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer = [rope, *(r for r in rope.values() if isinstance(r, dict))]
    found = [r for r in by_layer if r.get("rope_type", r.get("type")) == kind]
    fallback = text.max_position_embeddings if found else None
    lengths = [r.get("original_max_position_embeddings") or fallback for r in found]
    return [int(n) for n in lengths if n is not None]


@contextmanager
def _narrowed(model: Any, windows: dict[str, int]) -> Iterator[None]:
    """Narrows the windows of a model to WINDOW tokens, in its config and in all modules that store them."""
    changed: list[tuple[Any, str, int]] = []
    owners = [model.config.get_text_config(decoder=True), model.config, *model.modules()]
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if (
                isinstance(value, int)
                and not isinstance(value, bool)
                and value in windows.values()
                and WINDOWS.fullmatch(name)
            ):
                changed.append((owner, name, value))
    for owner, name, _ in changed:
        setattr(owner, name, WINDOW)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _special(config: Any) -> list[int | None]:
    text = config.get_text_config(decoder=True)
    return [
        getattr(text, f"{kind}_token_id", None)
        for kind in ("pad", "bos", "eos")
        if not isinstance(getattr(text, f"{kind}_token_id", None), list)
    ]


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _nats(error: float | None) -> str:
    return "error" if error is None else f"{error:.1e} nats"


def _up_to(tokens: int | None) -> str:
    return "" if tokens is None else f", in texts of up to {tokens} tokens"
