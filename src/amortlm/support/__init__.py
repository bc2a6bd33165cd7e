"""The support: which completions a policy can write at all, and what may come next. No model in here."""

from amortlm.support.law import SupportLaw
from amortlm.support.spec import Support

__all__ = ["Support", "SupportLaw"]
