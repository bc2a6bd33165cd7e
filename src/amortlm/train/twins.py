"""A check of the rows: does the sampler read what the target asks for?"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from amortlm.types import Row


def twins(rows: Sequence[Row], prompt: Collection[str], target: Collection[str]) -> str | None:
    """A sentence on the first two rows that have the same prompt but differ in a column that only the target uses; None
    if there are none. prompt, target: the columns that these use."""
    read, unread = sorted(prompt), sorted(set(target) - set(prompt))
    first: dict[tuple[str, ...], int] = {}
    for i, row in enumerate(rows):
        k = first.setdefault(tuple(str(row[column]) for column in read), i)
        for column in unread:
            if str(row[column]) != str(rows[k][column]):
                return (
                    f"rows {k} and {i} of train_dataset have the same prompt and differ in {column!r}, which only the "
                    "target uses: the sampler cannot tell them apart, and learns a mixture of their posteriors; show "
                    f"{{{column}}} in the prompt, or train on one of them"
                )
    return None
