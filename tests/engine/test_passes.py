"""A prompt that goes on is the same prompt, whether its parts went through the model together or one after the other."""

from __future__ import annotations

import pytest
import torch

TEXTS = [[7], [3, 9, 4, 1], []]
TOKENS = torch.tensor([[5, 6], [1, 2], [8, 3]])


@pytest.mark.parametrize("prompts", [[[4, 8, 15, 16], [2, 3]], [[4], [9]]], ids=["two lengths", "one token"])
def test_an_extended_prompt_is_the_whole_prompt(family_lm, prompts):
    passes, index = family_lm.passes, torch.tensor([1, 0, 0])
    with torch.no_grad():
        extended = passes.extend(passes.encode(prompts), index, TEXTS)
        whole = passes.encode([[*prompts[i], *t] for i, t in zip(index.tolist(), TEXTS, strict=True)])
        again = passes.extend(extended, torch.tensor([2, 0]), [[1], [5, 5, 5]])
        apart = passes.encode([[*whole.prompts[2], 1], [*whole.prompts[0], 5, 5, 5]])
        for found, expected in ((extended, whole), (again, apart)):
            assert found.prompts == expected.prompts
            count = len(found.prompts)
            a, b = (passes.state_logits(p, torch.arange(count), TOKENS[:count]) for p in (found, expected))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        other = passes.encode([[*prompts[1 - i], *t] for i, t in zip(index.tolist(), TEXTS, strict=True)])
        a, b = (passes.state_logits(p, torch.arange(3), TOKENS) for p in (extended, other))
        assert (a - b).abs().max() > 1e-3  # the prompt does matter
