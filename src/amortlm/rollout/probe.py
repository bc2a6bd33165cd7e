"""The check, at each load, that a server draws from the weights that it was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from amortlm.engine.adapter import holding
from amortlm.engine.decoding import Draws
from amortlm.engine.passes import Passes
from amortlm.engine.sampler import Request
from amortlm.errors import RolloutError
from amortlm.policy.policy import Policy
from amortlm.support.law import SupportLaw

PROMPT, TOKENS, COMPLETIONS, SEED = 6, 8, 4, 0


def probe(policy: Policy, block: int = 0, room: int = 0) -> Request:
    """The completions that are compared: a few, of a fixed prompt.

    block: how many tokens a server's cache of prefixes remembers at once. If a text may have as many (room: tokens of a
    text on the server), the prompt has more, so that a cache of other weights is found."""
    size, stop = policy.lm.vocab_size, policy.support.stop_ids[0]
    length = max(PROMPT, min(block + 1, room - TOKENS - 1, (policy.lm.context or room) - TOKENS - 1))
    allowed = torch.arange(size) != stop
    prompt = torch.linspace(0, size - 1, length).long().tolist()
    return Request([prompt], [COMPLETIONS], [SEED], SupportLaw((stop,), TOKENS, TOKENS, allowed))


@torch.no_grad()
def check_delivery(
    policy: Policy, weights: Mapping[str, Tensor], asked: Request, drawn: Draws, tolerance: float
) -> None:
    """Compare a server's log q of completions, those that `probe` asked for, with that of the policy, and with that of
    the frozen model.

    tolerance: nats per token, root mean square. Raises RolloutError if the server is further from the policy, or nearer
    to the frozen model than to the policy where rounding cannot explain it.
    """
    law, prompt = asked.law, asked.prompts[0]
    with holding(policy.model, weights):
        q = _log_q(policy.passes, law, prompt, drawn.tokens)
    p = _log_q(policy.lm.passes, law, prompt, drawn.tokens)
    error, base, moved = (_distance(*pair) for pair in ((drawn.log_pf, q), (drawn.log_pf, p), (p, q)))
    # A server that lost the weights is as near to p as rounding allows; where they matter, q is then further away.
    lost = base < error and moved > 4 * base
    if lost or not error <= tolerance:
        what = (
            "draws from its model without the weights"
            if lost
            else "draws from other weights or another model"
        )
        raise RolloutError(
            f"the server {what}: its log q of a token differs by {error:.2g} nats from the policy's ({tolerance:g} are "
            f"allowed), and by {base:.2g} from the frozen model's; start it with the model that the policy was made of"
        )


def _log_q(passes: Passes, law: SupportLaw, prompt: Sequence[int], tokens: Tensor) -> Tensor:
    """[B, T] log q of the tokens after the prompt, nats."""
    device = passes.model.device
    tokens = tokens.to(device)
    prefix = passes.encode([prompt])
    index = torch.zeros(len(tokens), dtype=torch.long, device=device)
    return law.log_probs(passes.state_logits(prefix, index, tokens[:, :-1]), tokens)[0].cpu()


def _distance(a: Tensor, b: Tensor) -> float:
    """Root mean square."""
    return (a.cpu() - b.cpu()).square().mean().sqrt().item()
