"""The frozen language model p: loading it, and the targets that it defines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from amortlm import versions
from amortlm.engine import gguf
from amortlm.engine.model import CausalLM
from amortlm.errors import ConfigError, ModelError
from amortlm.targets.lm import LogProb
from amortlm.text.template import Messages

EMBEDDED = "embedded"
EMBEDDED_PATH = Path(__file__).parent / "models" / "embedded"


class LanguageModel(CausalLM):
    """A causal LM and its tokenizer. Its weights are frozen: policies are trained on copies.

    `memory_mb`: what a pass without gradient may hold at once, in MiB, of p and of the policies made of it: logits,
    caches, masks, activations (default: 256 on a CPU, an eighth of a GPU). `self_check`: at first use, find out which
    ways through the model are exact (`amortlm.engine.exactness`; a second or two); without it, it is taken for a
    decoder with full attention, for which all are. Raises ModelError at first use for a model that is not causal.
    `chat_template_kwargs` go to the chat template of prompts that are messages: `{"enable_thinking": False}`,
    `{"tools": [..]}`. Among them `{"sanitize_control_tokens": False}` lets special tokens in the data of messages act
    as such: by default they are read as text, so that no row can forge a turn.
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
        **kwargs: Any,
    ) -> LanguageModel:
        """Load by hub name or local path through `transformers`; "embedded" is the model that ships.

        A name that ends in .gguf is a file, or one of a repository (`user/name/file.gguf`), and is dequantised.
        Keyword arguments (`dtype`, `revision`, `attn_implementation`, ...) go to
        `AutoModelForCausalLM.from_pretrained`. On a CPU the default dtype is float32.
        Raises ConfigError for what cannot be loaded, ModelError where a part of the weights is missing or not read.
        """
        path = EMBEDDED_PATH if str(name_or_path) == EMBEDDED else name_or_path
        place, file = gguf.locate(path)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            kwargs.setdefault("dtype", torch.float32)
        kwargs.setdefault("trust_remote_code", False)  # not asked for on the terminal
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                place, **file, trust_remote_code=kwargs["trust_remote_code"]
            )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, **(versions.dequantise() if file else {}), **file, **kwargs, output_loading_info=True
            )
            model, missing = loaded[0].to(device), sorted(loaded[1]["missing_keys"])
        except Exception as e:  # libraries raise whatever they meet in a damaged or hostile file
            if "trust_remote_code" in str(e):
                raise ConfigError(
                    f"cannot load a causal LM from {str(name_or_path)!r}: it brings code of its own, which is not run. "
                    "If you trust it, give LanguageModel.from_pretrained(..., trust_remote_code=True) as lm="
                ) from e
            raise ConfigError(
                f"cannot load a causal LM from {str(name_or_path)!r}: {e}\nGive a hub name, a local folder with "
                f"config.json, weights and tokenizer files, a {gguf.SUFFIX} file, or {EMBEDDED!r}."
            ) from e
        if missing:
            raise ModelError(
                f"{name_or_path}: {len(missing)} of the model's weights are not in its files "
                f"({', '.join(missing[:3])}) and would be random numbers. Give the folder of a whole causal LM"
            )
        if file:
            versions.unmark_quantised(model)
            if Path(path).is_file():
                gguf.check_complete(path, model)
        return cls(model, tokenizer, str(name_or_path), memory_mb, self_check, chat_template_kwargs)

    def log_prob(self, of: str, given: str | Messages = "") -> LogProb:
        """The target log p(of | given): templates over data columns and the latent `{z}`.

        `{z}` stands for the completion and its stop symbol. It appears once, in `of` or in `given`.
        `{z1}{z2}`: latents in sequence, the statements of a list (`separator` of `Support`).
        """
        return LogProb(self, of, given)
