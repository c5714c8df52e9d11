"""Scopes: which tokens an edit touches. Positions are absolute, whatever the cache and the padding."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import Pass

NAMED = ("all", "prompt", "generation", "last_prompt")
FORMS = "all, prompt, generation, last_prompt, a window such as 2:10, or token ids such as tokens:15,27"


@dataclass(frozen=True, kw_only=True, eq=False)
class Scope:
    """Which tokens are steered: a named part of the text, a window of positions, token ids, or a mask.

    Padding is never steered. The beginning-of-sequence token is left alone too, because its norm is an outlier, unless
    `include_bos` is set or a mask or token id names it.

    >>> Scope.of("2:10").window, sorted(Scope.of({7, 5}).token_ids)
    ((2, 10), [5, 7])
    """

    kind: str
    """One of all, prompt, generation, last_prompt, window, tokens, mask."""
    window: tuple[int, int | None] | None = None
    """Half-open interval of absolute positions, counted over real tokens with the BOS at 0; None as its end is open."""
    token_ids: frozenset[int] = frozenset()
    """The token ids to steer, for kind `tokens`."""
    mask: Tensor | None = None
    """[B, S] or [S] bool over the columns of the padded batch, for kind `mask`; later columns are not steered."""
    include_bos: bool = False
    """Steer the beginning-of-sequence token as well where it falls into the scope."""

    @classmethod
    def between(cls, start: int, stop: int | None, *, include_bos: bool = False) -> "Scope":
        """Absolute positions from `start` up to but not including `stop`; None means to the end."""
        if start < 0 or (stop is not None and stop <= start):
            raise SteersmanError(f"window {start}:{stop} is empty: positions are counted from 0, start before stop")
        return cls(kind="window", window=(start, stop), include_bos=include_bos)

    @classmethod
    def tokens(cls, ids: Iterable[int]) -> "Scope":
        """Every token, of prompt or generation, whose id is one of `ids`."""
        ids = frozenset(int(i) for i in ids)
        if not ids:
            raise SteersmanError("a scope of token ids needs at least one id")
        return cls(kind="tokens", token_ids=ids)

    @classmethod
    def where(cls, mask: Tensor) -> "Scope":
        """The columns where `mask`, [B, S] or [S] and aligned with the padded batch, is true."""
        mask = torch.as_tensor(mask)
        if mask.ndim not in (1, 2):
            raise SteersmanError(f"a scope mask must be [B, S] or [S], got {tuple(mask.shape)}")
        return cls(kind="mask", mask=mask.bool())

    @classmethod
    def of(cls, given: Any, *, include_bos: bool = False) -> "Scope":
        """A scope from what a user writes: a `Scope`, a name, "2:10" or slice or (2, 10), a set of ids, or a mask."""
        if isinstance(given, cls):
            return given
        if isinstance(given, Tensor):
            return cls.where(given)
        if isinstance(given, slice):
            if given.step not in (None, 1):
                raise SteersmanError(f"a window has no step, got {given}")
            return cls.between(given.start or 0, given.stop, include_bos=include_bos)
        if isinstance(given, tuple) and len(given) == 2:
            return cls.between(int(given[0]), None if given[1] is None else int(given[1]), include_bos=include_bos)
        if isinstance(given, set | frozenset):
            return cls.tokens(given)
        if isinstance(given, str):
            return cls._parse(given.strip(), include_bos)
        raise SteersmanError(f"unknown scope {given!r}: use {FORMS}, or a [B, S] mask")

    @classmethod
    def _parse(cls, text: str, include_bos: bool) -> "Scope":
        if text in NAMED:
            return cls(kind=text, include_bos=include_bos)
        head, _, tail = text.partition(":")
        try:
            if head == "tokens":
                return cls.tokens(int(i) for i in tail.split(","))
            if ":" in text:
                return cls.between(int(head or 0), int(tail) if tail else None, include_bos=include_bos)
        except SteersmanError:
            raise
        except ValueError:
            pass
        raise SteersmanError(f"unknown scope {text!r}: use {FORMS}")

    def select(self, now: Pass) -> Tensor | bool:
        """The steered tokens of a pass, [B, S] bool; True or False when all or none are, known without the device."""
        if self not in now.memo:
            now.memo[self] = self._select(now)
        return now.memo[self]

    def _select(self, now: Pass) -> Tensor | bool:
        if self.kind == "mask":
            return self._columns(now)
        if self.kind == "tokens":
            if now.input_ids is None:
                raise SteersmanError("a scope of token ids needs input_ids, the model was given embeddings")
            ids = torch.tensor(sorted(self.token_ids), device=now.device)
            return torch.isin(now.input_ids, ids) & now.real
        if self.kind == "window":
            return self._keep_bos(now, self._window(now))
        if now.phase == "generation":
            if self.kind in ("prompt", "last_prompt"):
                return False
            return True if now.all_real else now.real  # no BOS here: it belongs to the prompt
        if self.kind == "generation":
            return False if now.phase == "prompt" else now.generated
        if self.kind == "all":
            return self._keep_bos(now, now.real)
        prompt = now.in_prompt
        if self.kind == "last_prompt":
            prompt = prompt & (now.positions == now.prompt_length[:, None] - 1)
        return self._keep_bos(now, prompt)

    def _keep_bos(self, now: Pass, chosen: Tensor) -> Tensor:
        if self.include_bos or now.phase == "generation":
            return chosen
        return chosen & ~now.is_bos

    def _window(self, now: Pass) -> Tensor:
        assert self.window is not None
        start, stop = self.window
        inside = now.real & (now.positions >= start)
        return inside if stop is None else inside & (now.positions < stop)

    def _columns(self, now: Pass) -> Tensor | bool:
        assert self.mask is not None
        mask = self.mask.to(now.device)
        if now.past >= mask.shape[-1]:
            return False
        if mask.ndim == 2 and mask.shape[0] != now.batch:
            index = now.row_index(mask.shape[0], "the scope mask")
            mask = mask if index is None else mask[index]
        chosen = torch.zeros(now.batch, now.length, dtype=torch.bool, device=now.device)
        part = mask[..., now.past : now.past + now.length]
        chosen[:, : part.shape[-1]] = part
        return chosen & now.real
