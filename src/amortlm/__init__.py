"""amortlm: make a language model sample from posteriors that it defines but cannot sample."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Imported on first use: `import amortlm` and `amortlm --help` stay fast.
_HOMES = {
    "LanguageModel": "amortlm.language_model",
    "Target": "amortlm.targets.base",
    "LogProb": "amortlm.targets.lm",
    "Unordered": "amortlm.targets.lists",
    "Verifier": "amortlm.targets.constraints",
    "verifier": "amortlm.targets.constraints",
    "narrow": "amortlm.targets.narrow",
    "Support": "amortlm.support.spec",
    "Policy": "amortlm.policy.policy",
    "guided": "amortlm.policy.guide",
    "tempered": "amortlm.policy.guide",
    "Exploration": "amortlm.engine.decoding",
    "Tool": "amortlm.support.tools",
    "Calculator": "amortlm.support.tools",
    "Lookup": "amortlm.support.tools",
    "EM": "amortlm.em",
    "MStep": "amortlm.em",
    "Prediction": "amortlm.predictive",
    "Votes": "amortlm.predictive",
    "default_lora": "amortlm.engine.adapter",
    "GFNConfig": "amortlm.train.config",
    "GFNTrainer": "amortlm.train.trainer",
    "ReplayBuffer": "amortlm.buffer",
    "Posterior": "amortlm.posterior",
    "Diagnosis": "amortlm.diagnostics.diagnose",
    "Sample": "amortlm.posterior",
    "Samples": "amortlm.posterior",
    "Rollouts": "amortlm.types",
    "PolicyLogProbs": "amortlm.types",
    "AmortLMError": "amortlm.errors",
}
_MODULES = {
    "constraint": "amortlm.targets.constraints",
    "objectives": "amortlm.objectives",
    "bounds": "amortlm.diagnostics.bounds",
    "exact": "amortlm.inference.exact",
    "importance": "amortlm.diagnostics.importance",
    "errors": "amortlm.errors",
}
__all__ = ["__version__", *sorted(_HOMES), *sorted(_MODULES)]

if TYPE_CHECKING:
    from amortlm import errors as errors
    from amortlm import objectives as objectives
    from amortlm.buffer import ReplayBuffer as ReplayBuffer
    from amortlm.diagnostics import bounds as bounds
    from amortlm.diagnostics import importance as importance
    from amortlm.diagnostics.diagnose import Diagnosis as Diagnosis
    from amortlm.em import EM as EM
    from amortlm.em import MStep as MStep
    from amortlm.engine.adapter import default_lora as default_lora
    from amortlm.engine.decoding import Exploration as Exploration
    from amortlm.errors import AmortLMError as AmortLMError
    from amortlm.inference import exact as exact
    from amortlm.language_model import LanguageModel as LanguageModel
    from amortlm.policy.guide import guided as guided
    from amortlm.policy.guide import tempered as tempered
    from amortlm.policy.policy import Policy as Policy
    from amortlm.posterior import Posterior as Posterior
    from amortlm.posterior import Sample as Sample
    from amortlm.posterior import Samples as Samples
    from amortlm.predictive import Prediction as Prediction
    from amortlm.predictive import Votes as Votes
    from amortlm.support.spec import Support as Support
    from amortlm.support.tools import Calculator as Calculator
    from amortlm.support.tools import Lookup as Lookup
    from amortlm.support.tools import Tool as Tool
    from amortlm.targets import constraints as constraint  # noqa: F401
    from amortlm.targets.base import Target as Target
    from amortlm.targets.constraints import Verifier as Verifier
    from amortlm.targets.constraints import verifier as verifier
    from amortlm.targets.lists import Unordered as Unordered
    from amortlm.targets.lm import LogProb as LogProb
    from amortlm.targets.narrow import narrow as narrow
    from amortlm.train.config import GFNConfig as GFNConfig
    from amortlm.train.trainer import GFNTrainer as GFNTrainer
    from amortlm.types import PolicyLogProbs as PolicyLogProbs
    from amortlm.types import Rollouts as Rollouts


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'amortlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
