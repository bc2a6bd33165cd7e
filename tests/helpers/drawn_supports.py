"""One support of each kind, for tests of samplers that draw elsewhere."""

from amortlm import Support

FEW = ["a", "b", "at"]
SUPPORTS = {
    "one stop": Support(stop=".", max_tokens=3, allowed_tokens=FEW),
    "two stops": Support(stop=[".", "!"], min_tokens=2, max_tokens=3, allowed_tokens=FEW),
    "banned": Support(stop=".", min_tokens=0, max_tokens=2, banned_tokens=["a", "b"]),
    "list": Support(stop=".", max_tokens=5, separator=",", max_statements=2, allowed_tokens=["a", "b"]),
    "pattern": Support(stop=[".", "!"], min_tokens=0, max_tokens=4, pattern="(a|b|cat)*( ?t(t|a)?)?"),
    "too large to list": Support(stop=".", min_tokens=3, max_tokens=4),
}
