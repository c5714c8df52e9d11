"""Editing the logits of chosen tokens, at the hook point `logits`.

A logit at position p is of the token at p + 1: the first generated token's is in scope `prompt`. For any other function
of the logits see `FunctionEdit`, for a vector over the whole vocabulary `VectorEdit`.

Shape letters: B rows, V vocabulary, n tokens that have logits; M tokens named in any row, R rows of parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from steersman.doors import number, whole_number
from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel
from steersman.steer.edits.base import Edit, PerRow, Saved, blend, common_rows, per_row


class LogitsEdit(Edit):
    """logits_t + factor s_t for the tokens t named in `tokens`: {token id: s}, or a list of those with one per row.

    `factor` is a number or [B]. s = -inf forbids the token, at every factor but 0.

    >>> edit = LogitsEdit({15: 2.0, 27: -float("inf")})
    """

    name = "logits"

    def __init__(self, tokens: Mapping[int, float] | Sequence[Mapping[int, float]], factor: PerRow = 1.0) -> None:
        self.tokens = [tokens] if isinstance(tokens, Mapping) else list(tokens)
        if not all(isinstance(row, Mapping) for row in self.tokens) or not any(self.tokens):
            raise SteersmanError("tokens must be {token id: amount}, or a list of those with one entry per row")
        rows = [
            {whole_number(t, "a token id"): number(s, f"the amount of token {t}") for t, s in row.items()}
            for row in self.tokens
        ]
        named = sorted({t for row in rows for t in row})
        amount = torch.tensor([[row.get(t, 0.0) for t in named] for row in rows])
        if bool((amount == torch.inf).any()):
            raise SteersmanError("what is added to a logit must be a finite number, or -inf to forbid the token")
        self.factor = per_row(factor, "factor", amount.device)
        self.rows = common_rows(tokens=len(amount), factor=len(self.factor))
        self.ids = torch.tensor(named)
        forbidden = (amount == -torch.inf) & (self.factor != 0)[:, None]
        finite = amount.masked_fill(amount == -torch.inf, 0.0) * self.factor[:, None]
        self.amount = finite.masked_fill(forbidden, -torch.inf)  # [R, M]
        self.active = (self.amount != 0).any(1)

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        if point.kind != "logits":
            raise SteersmanError(f"logits are edited at the hook point 'logits', not at {point.name}")
        if not 0 <= int(self.ids[0]) <= int(self.ids[-1]) < point.width:
            raise SteersmanError(f"no token {int(self.ids[-1])}: the vocabulary of {lm.name} has {point.width}")

    def saved(self) -> Saved:
        rows = [[[t, "-inf" if s == -float("inf") else s] for t, s in row.items()] for row in self.tokens]
        return Saved({"tokens": rows}, {"factor": self.factor})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        return cls([{t: float(s) for t, s in row} for row in saved.settings["tokens"]], saved.tensors["factor"])

    def scaled(self, factor: PerRow) -> "LogitsEdit":
        factors = per_row(factor, "factor", self.factor.device)
        common_rows(edit=len(self.factor), factor=len(factors))
        return LogitsEdit(self.tokens, self.factor * factors)

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        amount = self.expand(self.amount.to(h.device, h.dtype), fwd)[:, None]
        new = h.index_add(-1, self.ids.to(h.device), amount.expand(*h.shape[:2], -1))
        return blend(h, new, where)
