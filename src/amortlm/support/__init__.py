"""The support: the set of completions that a policy can write, and the legal next tokens. It uses no model."""

from amortlm.support.law import SupportLaw
from amortlm.support.spec import Support

__all__ = ["Support", "SupportLaw"]
