"""The frozen language model p: loading it, and the targets that it defines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from amortlm import versions
from amortlm.engine import gguf, quantised
from amortlm.engine.model import CausalLM
from amortlm.errors import ConfigError, MissingExtraError, ModelError
from amortlm.targets.lm import LogProb
from amortlm.targets.statements import StatementLogProb, log_prob
from amortlm.text.template import Messages

EMBEDDED = "embedded"
EMBEDDED_PATH = Path(__file__).parent / "models" / "embedded"


class LanguageModel(CausalLM):
    """A causal LM and its tokenizer. Its weights are frozen: policies are trained on copies.

    memory_mb             bound on what a pass without gradient holds at once, in MiB, for p and its policies: logits,
                          caches, masks, activations. Default: 256 on a CPU, an eighth of a GPU
    self_check            at first use, test which kinds of passes (shared prompts, packed suffixes, ..) are exact for
                          the model (`amortlm.engine.exactness`; a second or two). Without the test the model is assumed
                          to be a decoder with full attention, for which all are exact
    chat_template_kwargs  arguments of the chat template, for prompts that are messages: `{"enable_thinking": False}`,
                          `{"tools": [..]}`. With `{"sanitize_control_tokens": False}` special tokens in the data of
                          messages are read as special tokens; by default they are read as text, so that no row can
                          forge a turn

    static_cache          policies draw in a cache of a fixed size, on CUDA by a graph, without the host between tokens
                          (`amortlm.engine.static`). Off by default, because it was not measured on a GPU. Supports with
                          a tool, sharded models, and models for which transformers has no such cache are refused

    With self_check, a model that is not causal raises ModelError at first use.
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        memory_mb: float | None = None,
        self_check: bool = True,
        device: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        static_cache: bool = False,
        **kwargs: Any,
    ) -> LanguageModel:
        """Load by hub name or local path through `transformers`; "embedded" is the model that ships.

        A name that ends in .gguf is a file, or one of a repository (`user/name/file.gguf`), and is dequantised.
        Keyword arguments (`dtype`, `revision`, `attn_implementation`, ...) go to
        `AutoModelForCausalLM.from_pretrained`. On a CPU the default dtype is float32.
        With `quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...)` of transformers p is the model in 4 bits
        (extra `[qlora]`); the default dtype is then its `bnb_4bit_compute_dtype`.
        Raises ConfigError for what cannot be loaded, MissingExtraError without bitsandbytes, ModelError where a part of
        the weights is missing or not read.
        """
        path = EMBEDDED_PATH if str(name_or_path) == EMBEDDED else name_or_path
        place, file = gguf.locate(path)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        packing: Any = kwargs.get("quantization_config")
        if getattr(packing, "load_in_4bit", False):
            kwargs.setdefault("dtype", packing.bnb_4bit_compute_dtype)
        elif device == "cpu":
            kwargs.setdefault("dtype", torch.float32)
        kwargs.setdefault("trust_remote_code", False)  # else transformers asks on the terminal
        model, tokenizer = _load(str(name_or_path), place, device, file, kwargs)
        quantised.prepare(model, str(name_or_path))
        lm = cls(
            model, tokenizer, str(name_or_path), memory_mb, self_check, chat_template_kwargs, static_cache
        )
        if file:
            versions.unmark_quantised(model)
            gguf.check_complete(path, model)
            gguf.check_spaces(lm)
        return lm

    def log_prob(self, of: str, given: str | Messages = "") -> LogProb | StatementLogProb:
        """The target log p(of | given), in nats. `of` and `given` are templates over data columns and the latent `{z}`.

        `{z}` stands for the completion and its stop symbol. It appears once, in `of` or in `given`. `{z1}{z2}` are
        latents in sequence, the statements of a list (`separator` of `Support`). A term may also mention some
        statements alone, each where it is needed, as in `log_prob("{y}", given="{x}{z1}.")`: see
        `amortlm.targets.statements`. Raises TemplateError.
        """
        return log_prob(self, of, given)


def without_weights(name_or_path: str | Path, dtype: str | None = None) -> LanguageModel:
    """The model of a name or path with tokenizer and shapes, on the meta device: nothing can be computed with it.
    dtype: None for the one that `LanguageModel.from_pretrained` takes here. Raises ConfigError for what cannot be
    read."""
    path = EMBEDDED_PATH if str(name_or_path) == EMBEDDED else name_or_path
    place, file = gguf.locate(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **file, trust_remote_code=False)
        config = AutoConfig.from_pretrained(place, **file, trust_remote_code=False)
        own = config.dtype if torch.cuda.is_available() else torch.float32
        taken = own if dtype is None else getattr(torch, dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=taken or torch.float32)
    except Exception as e:  # as in `_load`
        raise ConfigError(f"cannot read the config and tokenizer of {str(name_or_path)!r}: {e}") from e
    return LanguageModel(model, tokenizer, str(name_or_path), self_check=False)


def _load(
    name: str, place: str, device: str, file: Mapping[str, str], settings: dict[str, Any]
) -> tuple[Any, Any]:
    """(model, tokenizer) by transformers. Raises ConfigError, ModelError."""
    trust = settings["trust_remote_code"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **file, trust_remote_code=trust)
        if file:
            settings = {**versions.dequantise(), **settings}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, **file, **settings, output_loading_info=True
        )
        model, missing = loaded[0].to(device), sorted(loaded[1]["missing_keys"])
    except Exception as e:  # damaged or hostile files make libraries raise errors of any kind
        if "trust_remote_code" in str(e):
            raise ConfigError(
                f"cannot load a causal LM from {name!r}: it contains code, which is not run. If you trust the code, "
                "give LanguageModel.from_pretrained(..., trust_remote_code=True) as lm="
            ) from e
        if isinstance(e, ImportError) and "bitsandbytes" in str(e):
            raise MissingExtraError(
                f"{name} in 4 bits needs bitsandbytes: pip install 'amortlm[qlora]'"
            ) from e
        raise ConfigError(
            f"cannot load a causal LM from {name!r}: {e}\nGive a hub name, a local folder with "
            f"config.json, weights and tokenizer files, a {gguf.SUFFIX} file, or {EMBEDDED!r}."
        ) from e
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} of the model's weights are not in its files ({', '.join(missing[:3])}) and would "
            "be random numbers. Give the folder of a whole causal LM"
        )
    return model, tokenizer
