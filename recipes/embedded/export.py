"""Write a model folder that plain ``from_pretrained`` loads."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from .tokenizer import wrap


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Half-precision weights, configuration and tokenizer; each file is replaced whole."""
    output.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".export-", dir=output))
    try:
        model.to(torch.float16).save_pretrained(fresh)
        GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(fresh)
        wrap(tokenizer).save_pretrained(fresh)
        settings = fresh / "tokenizer_config.json"
        loaded = json.loads(settings.read_text(encoding="utf-8"))
        loaded["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.write_text(json.dumps(loaded, indent=2) + "\n", encoding="utf-8")
        for file in sorted(fresh.iterdir()):
            file.chmod(0o644)
            file.replace(output / file.name)
    finally:
        shutil.rmtree(fresh)
