"""Text to tokens and back, for one language model: its tokenizer and the sizes of its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from amortlm import versions
from amortlm.errors import ConfigError, DataError, SupportError
from amortlm.text.template import Pieces, PromptTemplate
from amortlm.types import Row


class Codec:
    """A tokenizer, and the sizes of a model's vocabularies; it holds no weights.

    vocab_size            number of tokens that the model can write (it may be more than the tokenizer has)
    num_embeddings        number of tokens that the model can read
    context               the longest sequence for the model, in tokens; None: unknown
    chat_template_kwargs  see `amortlm.LanguageModel`
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        vocab_size: int,
        num_embeddings: int,
        context: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.tokenizer, self.name = tokenizer, name
        self.vocab_size, self.num_embeddings, self.context = vocab_size, num_embeddings, context
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        for key in ("conversation", "tokenize", "add_generation_prompt", "continue_final_message"):
            if key in self.chat_template_kwargs:
                raise ConfigError(f"chat_template_kwargs: {key!r} is set from the prompt; take it out")
        self._controls: dict[str, re.Pattern[str]] = {}  # by chat template
        self._parts: dict[str, bool] = {}
        first = tokenizer("a").input_ids[:1]
        self._adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        newline = self._encode("\n")
        # Llama-style tokenizers add a space to the start of every text, but not after a newline.
        self._anchor = newline if self._encode("\na")[len(newline) :] != self._encode("a") else []

    def _encode(self, text: str, **settings: Any) -> list[int]:
        # Not verbose: `check_context` reports texts that are too long, with a remedy.
        if not text:
            return []
        return self._known(
            self.tokenizer(text, add_special_tokens=False, verbose=False, **settings).input_ids
        )

    def _known(self, ids: list[int]) -> list[int]:
        """The same tokens. Raises ConfigError if the model has no embedding for one of them."""
        size = self.num_embeddings
        if ids and max(ids) >= size:
            raise ConfigError(
                f"{self.name}: the tokenizer has a token {self.tokenizer.convert_ids_to_tokens(max(ids))!r} (id "
                f"{max(ids)}) that the model, with {size} embeddings, does not know; call "
                "model.resize_token_embeddings(len(tokenizer)) and train them, or use the model's own tokenizer"
            )
        return ids

    def encode_start(self, text: str) -> list[int]:
        """Tokens of a text that begins a sequence. They are never empty: an empty text gives BOS, or EOS for models
        without BOS. Raises ConfigError if there is neither."""
        tok = self.tokenizer
        start = tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id
        ids = self._encode(text)
        if (self._adds_bos and ids[:1] != [start]) or not ids:
            if start is None:
                raise ConfigError(
                    f"{self.name}: an empty prompt needs a token to start from, and the tokenizer has neither BOS "
                    "nor EOS; set tokenizer.bos_token, or write a prompt"
                )
            ids = self._known([start, *ids])
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Tokens of a text that continues a sequence; its leading space must be part of the text."""
        if not text or not self._anchor:
            return self._encode(text)
        return self._encode("\n" + text)[len(self._anchor) :]

    def encode_prompt(self, prompt: PromptTemplate, row: Row) -> list[int]:
        """Tokens of a filled-in prompt; messages go through the chat template.

        In a text prompt, a special token that is written out is read as the special token, also in the data. In
        messages it is read so only in the template; in the data it is read as text. Raises ConfigError if the chat
        template refuses the messages, DataError or TemplateError for a row that does not fit."""
        marked: list[str] = []

        def join(pieces: Pieces) -> str:
            text, own, end = "".join(text for text, _ in pieces), [], 0
            for part, is_data in pieces:
                if not is_data:
                    own.append((end, end + len(part)))
                end += len(part)

            def mark(found: re.Match[str]) -> str:
                if any(a <= found.start() and found.end() <= b for a, b in own):
                    return found[0]
                marked.append(found[0])
                return versions.mark_control_token(found[0], control)

            control = self._control_tokens
            return control.sub(mark, text)

        sanitize = self.chat_template_kwargs.get("sanitize_control_tokens", True)
        messages = prompt.messages(row, join if sanitize else None)
        if messages is None:
            return self.encode_start(prompt.templates[0].split(row)[0])
        text = self._render(messages)
        try:
            return self._encode(text, **(versions.reading_marked() if marked else {}))
        except (ValueError, NotImplementedError) as e:
            if not marked or isinstance(e, ConfigError):
                raise
            raise DataError(
                f"{self.name}: {marked[0]!r} in a message cannot be read as text ({e}); take it out of the data"
            ) from e

    @property
    def _chat_template(self) -> str:
        settings = self.chat_template_kwargs
        if not self.tokenizer.chat_template and not settings.get("chat_template"):
            raise ConfigError(
                f"{self.name}: the tokenizer has no chat template, so a prompt given as messages cannot be "
                "rendered; give the prompt as one string, or set tokenizer.chat_template"
            )
        try:
            return str(self.tokenizer.get_chat_template(settings.get("chat_template"), settings.get("tools")))
        except ValueError as e:
            raise self._refusal(e) from e

    @property
    def _control_tokens(self) -> re.Pattern[str]:
        """The tokens that structure a chat: special tokens, and tokens that the chat template writes."""
        template = self._chat_template
        if template not in self._controls:
            try:
                tokens = versions.control_tokens(self.tokenizer, template)
            except Exception as e:  # an invalid template
                raise self._refusal(e) from e
            longest_first = sorted(tokens, key=len, reverse=True)
            self._controls[template] = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        return self._controls[template]

    @property
    def _reads_parts(self) -> bool:
        """Does the chat template ignore a content given as text? Then it needs a list of parts."""
        template = self._chat_template
        if template not in self._parts:
            probe = "probe of the template"
            try:
                text = self._apply([{"role": "user", "content": probe}], add_generation_prompt=True)
                self._parts[template] = probe not in text
            except ConfigError:
                self._parts[template] = False
        return self._parts[template]

    def _render(self, messages: list[dict[str, Any]]) -> str:
        """The text of messages. A last message of the assistant is to be continued; else a new one of the assistant
        begins."""
        goes_on = messages[-1]["role"] == "assistant"
        if goes_on and not messages[-1]["content"].strip():
            raise DataError(
                "the last message is the assistant's, to be continued, and it is empty: leave it out"
            )
        if self._reads_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return self._apply(messages, continue_final_message=goes_on, add_generation_prompt=not goes_on)

    def _apply(self, messages: list[dict[str, Any]], **how: Any) -> str:
        settings = {k: v for k, v in self.chat_template_kwargs.items() if k != "sanitize_control_tokens"}
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **how, **settings))
        except Exception as e:  # a chat template is a program, and can raise any error
            raise self._refusal(e) from e

    def _refusal(self, e: Exception) -> ConfigError:
        return ConfigError(
            f"{self.name}: the chat template cannot render these messages ({type(e).__name__}: {e}); change the roles "
            "or their order, chat_template_kwargs, or tokenizer.chat_template"
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a continuation, including its leading space and its special tokens (which are written only if the
        support names them)."""
        text = str(self.tokenizer.decode([*self._anchor, *tokens], clean_up_tokenization_spaces=False))
        return text.removeprefix("\n") if self._anchor else text

    def token_id(self, token: str | int) -> int:
        """The id of one token given as text or id. Raises SupportError if the text is not one token, or if the model
        cannot write the token."""
        if isinstance(token, int):
            if not 0 <= token < self.vocab_size:
                raise SupportError(f"token id {token} is outside the vocabulary (0..{self.vocab_size - 1})")
            return token
        ids = self.encode_continuation(token)
        if len(ids) != 1:
            pieces = self.tokenizer.convert_ids_to_tokens(ids)
            raise SupportError(
                f"{token!r} is {len(ids)} tokens for this tokenizer ({pieces}), not one; use one of these, a token "
                "id, or another symbol"
            )
        if ids[0] >= self.vocab_size:
            raise SupportError(
                f"{token!r} has id {ids[0]}, which the model ({self.vocab_size} tokens) cannot write"
            )
        return ids[0]

    @cached_property
    def special_ids(self) -> set[int]:
        """The tokenizer's special tokens, and tokens without text."""
        tok = self.tokenizer
        special = {i for i, token in tok.added_tokens_decoder.items() if token.special} | set(
            tok.all_special_ids
        )
        rest = [i for i in range(len(tok)) if i not in special]
        texts = tok.batch_decode([[*self._anchor, i] for i in rest], clean_up_tokenization_spaces=False)
        empty = tok.decode(self._anchor) if self._anchor else ""
        return special | {i for i, text in zip(rest, texts, strict=True) if text == empty}
