"""amortlm doctor: versions, and what is exact for a model here."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

from amortlm.environment import environment
from amortlm.language_model import LanguageModel
from amortlm.policy.laws import examine_policy, examine_sampling
from amortlm.types import finite

# Versions that are named, of what is installed.
PACKAGES = (
    *("amortlm", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("huggingface_hub", "numpy", "gguf", "trl", "genlm-control"),
)


def run(args: Namespace) -> int:
    lm = LanguageModel.from_pretrained(args.model)
    found = lm.exactness
    law = examine_sampling(lm)
    found = replace(found, findings=(*found.findings, *examine_policy(lm), *law.findings))
    place = {
        **environment(PACKAGES),
        "device": str(lm.model.device),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
    }
    if args.json:
        told = {
            **found.to_dict(),
            **place,
            "law": {"holds": law.holds, "error": law.error, "draws": law.draws},
        }
        print(json.dumps(finite(told)))
    else:
        print(f"Python {place['python']};", ", ".join(f"{name} {v}" for name, v in place["packages"].items()))
        print(
            f"{place['cpu']}, {place['cores']} cores, {place['threads']} threads; {place['gpu'] or 'no GPU'}"
        )
        print(f"{args.model}: {place['device']}, {place['dtype']}\n\n{found}\n{law}")
    return 0 if law.holds else 1
