"""Examples that come in groups: pairs made from one program, paragraph or episode are no independent evidence.

Vectors for the types of programs (arXiv 2404.01903) are `caa` at the last token of pairs (a program predicted right, a
semantics-preserving edit of it predicted wrong), at most 3 pairs of one program and 25 of one type: `capped` keeps that
many, `split_groups` makes a test set that shares no program with the examples, and `check_apart` refuses one that does.
The published code builds the test split from the examples of the vector when an option is set.
"""

import random
from collections import Counter
from collections.abc import Sequence

from steersman.errors import SteersmanError
from steersman.steer.methods.examples import Example, Examples


def capped(examples: Examples, *, per_group: int | None = 3, total: int | None = 25, seed: int = 0) -> Examples:
    """Pairs of `examples`, at most `per_group` of one group and `total` in all, drawn by `seed`, in their order.

    Raises SteersmanError where the sides are no pairs or a positive example has no group.
    """
    examples.check_pairs("capped")
    _check_groups(examples.positive)
    order = list(range(len(examples.positive)))
    random.Random(seed).shuffle(order)
    count: Counter[str] = Counter()
    kept: list[int] = []
    for i in order:
        group = examples.positive[i].group
        if (per_group is None or count[group] < per_group) and (total is None or len(kept) < total):
            count[group] += 1
            kept.append(i)
    return _pairs(examples, sorted(kept))


def split_groups(examples: Examples, *, test: float = 0.2, seed: int = 0) -> tuple[Examples, Examples]:
    """Pairs to make a vector from and pairs to test it on, which share no group: about `test` of the groups are for the
    test. Raises SteersmanError where there are fewer than two groups."""
    examples.check_pairs("split_groups")
    _check_groups(examples.positive)
    groups = sorted({example.group for example in examples.positive})
    if len(groups) < 2 or not 0 < test < 1:
        raise SteersmanError(f"to split {len(groups)} group(s), there must be two at least and test between 0 and 1")
    random.Random(seed).shuffle(groups)
    held = set(groups[: min(len(groups) - 1, max(1, round(test * len(groups))))])
    number = range(len(examples.positive))
    made = _pairs(examples, [i for i in number if examples.positive[i].group not in held])
    return made, _pairs(examples, [i for i in number if examples.positive[i].group in held])


def check_apart(made: Examples, test: Examples) -> None:
    """Raise SteersmanError where examples of `test` share a group with those that a vector was made from."""
    for side in (made, test):
        _check_groups([*side.positive, *side.negative])
    shared = {e.group for e in (*made.positive, *made.negative)} & {e.group for e in (*test.positive, *test.negative)}
    if shared:
        some = ", ".join(repr(group) for group in sorted(shared)[:3])
        raise SteersmanError(
            f"the test shares {len(shared)} group(s) with the examples of the vector ({some}): use split_groups"
        )


def _check_groups(examples: Sequence[Example]) -> None:
    if not all(example.group for example in examples):
        raise SteersmanError("examples need a group, such as the program they were made from")


def _pairs(examples: Examples, kept: Sequence[int]) -> Examples:
    return Examples(positive=[examples.positive[i] for i in kept], negative=[examples.negative[i] for i in kept])
