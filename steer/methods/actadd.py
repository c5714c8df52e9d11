"""`actadd` (activation addition): v_p = h_p(p+) - h_p(p-), added position by position from the front.

Both prompts are read from their BOS on, the shorter one filled up with spaces at its end, and row p of the vector is
added at absolute position p of whatever is steered. Equal beginnings, the BOS among them, have equal states and so rows
of zero. The paper's coefficient c is the `scale` of steering. Source: arXiv 2308.10248, section 3. Several pairs are
averaged row by row, each over the pairs that reach that far.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.methods.base import ContrastConfig, Made, Method, check_differ
from steersman.steer.methods.examples import Examples


class ActAdd(Method):
    """Difference of two prompts, position by position."""

    name = "actadd"
    source = "arXiv 2308.10248"
    positions = "one by one"
    reads = "every position"

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        super().check(examples, config, has_means=has_means)
        examples.check_pairs(self.name)

    def make(
        self,
        lm: LanguageModel,
        examples: Examples,
        hooks: list[str],
        config: ContrastConfig,
        means: Mapping[str, Tensor] | None,
    ) -> Made:
        space = space_token(lm)
        totals: dict[str, Tensor] = {}
        size: dict[str, float] = {}  # the largest norm of a prompt's states, to tell a difference from rounding
        counts = torch.zeros(0)
        for plus, minus in zip(examples.positive, examples.negative):
            pair = [lm.token_ids(e.text, bos=True)[: config.max_length] for e in (plus, minus)]
            length = max(map(len, pair))
            if lm.context_length is not None and length > lm.context_length:
                raise SteersmanError(
                    f"a prompt of {length} tokens exceeds the context of {lm.name}, {lm.context_length}: set max_length"
                )
            ids = torch.tensor([row + [space] * (length - len(row)) for row in pair])
            states = lm.capture(ids, hooks=hooks)
            counts = _padded(counts[:, None], length)[:, 0]
            counts[:length] += 1
            for hook, h in states.items():
                difference = (h[0].float() - h[1].float()).cpu()
                known = _padded(totals.get(hook, difference[:0]), length)
                known[:length] += difference
                totals[hook] = known
                size[hook] = max(size.get(hook, 0.0), float(h[0].float().norm()))
        directions = {hook: total / counts[:, None] for hook, total in totals.items()}
        for hook, direction in directions.items():
            if not bool(direction.isfinite().all()):
                raise SteersmanError(f"{lm.name} gives NaN or infinite states at {hook}")
            check_differ(direction, size[hook], self.name, hook)
        return Made(directions=directions, notes={"positions": len(counts), "filled_with_token": space})


def space_token(lm: LanguageModel) -> int:
    """The id that fills up the shorter prompt: a single space's, where the tokenizer has one, else the padding's."""
    ids = lm.token_ids(" ")
    if len(ids) == 1:
        return ids[0]
    return lm.pad_token_id or 0


def _padded(x: Tensor, rows: int) -> Tensor:
    """x [P, D] as a new tensor of at least `rows` rows, filled with zeros."""
    return torch.cat([x, x.new_zeros(max(0, rows - len(x)), x.shape[1])])
