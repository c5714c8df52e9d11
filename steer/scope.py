"""Scopes: which tokens an edit touches. Positions are absolute, whatever the cache and the padding."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel
from steersman.lm.chat_spans import PARTS, ChatPart

NAMED = ("all", "prompt", "generation", "last_prompt")
FORMS = (
    "all, prompt, generation, last_prompt, a window such as 2:10, token ids such as tokens:15,27, of a chat "
    f"{', '.join(PARTS)}, role:NAME or turn:N, or several of those joined by +"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scope:
    """Which tokens are steered: a named part of the text or of a conversation, a window of positions, token ids, or a
    mask.

    Padding is never steered. The beginning-of-sequence token is left alone too, because its norm is an outlier, unless
    `include_bos` is set or a mask or token id names it.

    >>> Scope.of("2:10").window, sorted(Scope.of({7, 5}).token_ids)
    ((2, 10), [5, 7])

    "last_prompt+generation" are the tokens whose outputs choose the generated ones.

    >>> [part.kind for part in Scope.of("last_prompt+generation").parts]
    ['last_prompt', 'generation']
    """

    kind: str
    """One of all, prompt, generation, last_prompt, window, tokens, mask, chat, union."""
    window: tuple[int, int | None] | None = None
    """Half-open interval of absolute positions, counted over real tokens with the BOS at 0; None as its end is open.
    An end below 0 counts back from the end of the prompt: (0, -1) is the prompt without its last token."""
    token_ids: frozenset[int] = frozenset()
    """The token ids to steer, for kind `tokens`."""
    mask: Tensor | None = None
    """[B, S] or [S] bool over the columns of the padded batch, for kind `mask`; later columns are not steered."""
    parts: tuple["Scope", ...] = ()
    """For kind `union`: a token is steered where one of these has it."""
    part: ChatPart | None = None
    """The part of a conversation, for kind `chat`."""
    include_bos: bool = False
    """Steer the beginning-of-sequence token as well where it falls into the scope."""

    @classmethod
    def between(cls, start: int, stop: int | None, *, include_bos: bool = False) -> "Scope":
        """Absolute positions from `start` up to but not including `stop`; None means to the end, and a `stop` below 0
        counts back from the end of the prompt."""
        start = whole_number(start, "the start of a window")
        stop = None if stop is None else whole_number(stop, "the end of a window")
        if start < 0 or (stop is not None and 0 <= stop <= start):
            raise SteersmanError(f"window {start}:{stop} is empty: positions are counted from 0, start before stop")
        return cls(kind="window", window=(start, stop), include_bos=include_bos)

    @classmethod
    def tokens(cls, ids: Iterable[int]) -> "Scope":
        """Every token, of prompt or generation, whose id is one of `ids`."""
        ids = frozenset(whole_number(i, "a token id of a scope", at_least=0) for i in ids)
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
    def of(cls, given: "ScopeLike", *, include_bos: bool = False) -> "Scope":
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
            return cls.between(given[0], given[1], include_bos=include_bos)
        if isinstance(given, set | frozenset):
            return cls.tokens(given)
        if isinstance(given, str):
            return cls._parse(given.strip(), include_bos)
        raise SteersmanError(f"unknown scope {given!r}: use {FORMS}, or a [B, S] mask")

    @classmethod
    def _parse(cls, text: str, include_bos: bool) -> "Scope":
        if "+" in text:
            parts = tuple(cls._parse(part.strip(), include_bos) for part in text.split("+"))
            return cls(kind="union", parts=parts, include_bos=include_bos)
        if text in NAMED:
            return cls(kind=text, include_bos=include_bos)
        if (part := ChatPart.parse(text)) is not None:
            return cls(kind="chat", part=part, include_bos=include_bos)
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

    def check(self, lm: LanguageModel) -> None:
        """Raise SteersmanError for a part of conversations that the model's chat template does not have."""
        for scope in self.parts:
            scope.check(lm)
        if self.part is not None:
            template = lm.chat_template
            if self.part.kind == "role":
                template.check_role(self.part.role)
            if self.part.kind == "thinking":
                _ = template.think_markers

    def select(self, fwd: ForwardPass) -> Tensor | bool:
        """The steered tokens of a pass, [B, S] bool; True or False when all or none are, known without the device."""
        if self not in fwd.memo:
            fwd.memo[self] = self._select(fwd)
        return fwd.memo[self]

    def _select(self, fwd: ForwardPass) -> Tensor | bool:
        if self.kind == "union":
            return self._union(fwd)
        if self.kind == "mask":
            return self._columns(fwd)
        if self.kind == "tokens":
            if fwd.input_ids is None:
                raise SteersmanError("a scope of token ids needs input_ids, the model was given embeddings")
            ids = torch.tensor(sorted(self.token_ids), device=fwd.device)
            return torch.isin(fwd.input_ids, ids) & fwd.real
        if self.part is not None:
            return self._keep_bos(fwd, self._chat(fwd, self.part))
        if self.kind == "window":
            return self._keep_bos(fwd, self._window(fwd))
        if fwd.phase == "generation":
            if self.kind in ("prompt", "last_prompt"):
                return False
            return True if fwd.all_real else fwd.real  # no BOS here: it belongs to the prompt
        if self.kind == "generation":
            return False if fwd.phase == "prompt" else fwd.generated
        if self.kind == "all":
            return self._keep_bos(fwd, fwd.real)
        prompt = fwd.in_prompt
        if self.kind == "last_prompt":
            prompt = prompt & (fwd.positions == fwd.prompt_length[:, None] - 1)
        return self._keep_bos(fwd, prompt)

    def _union(self, fwd: ForwardPass) -> Tensor | bool:
        chosen: Tensor | bool = False
        for part in self.parts:
            found = part.select(fwd)
            if isinstance(found, bool):
                if found:
                    return True
            else:
                chosen = found if isinstance(chosen, bool) else chosen | found
        return chosen

    @staticmethod
    def _chat(fwd: ForwardPass, part: ChatPart) -> Tensor | bool:
        if fwd.spans is None:
            raise SteersmanError(
                f"scope '{part}' needs to know whose the tokens of a pass are: give messages to lm.chat or "
                "lm.generate, the batch of lm.encode_chat to lm.logits, or open lm.chat_spans(batch)"
            )
        return fwd.spans.where(part, fwd)

    def _keep_bos(self, fwd: ForwardPass, chosen: Any) -> Any:
        if isinstance(chosen, bool) or self.include_bos or fwd.phase == "generation":
            return chosen
        return chosen & ~fwd.is_bos

    def _window(self, fwd: ForwardPass) -> Tensor:
        assert self.window is not None
        start, stop = self.window
        inside = fwd.real & (fwd.positions >= start)
        if stop is None:
            return inside
        return inside & (fwd.positions < (stop if stop >= 0 else fwd.prompt_length[:, None] + stop))

    def _columns(self, fwd: ForwardPass) -> Tensor | bool:
        assert self.mask is not None
        mask = self.mask.to(fwd.device)
        if fwd.past >= mask.shape[-1]:
            return False
        if mask.ndim == 2 and mask.shape[0] != fwd.batch:
            index = fwd.row_index(mask.shape[0], "the scope mask")
            mask = mask if index is None else mask[index]
        chosen = torch.zeros(fwd.batch, fwd.length, dtype=torch.bool, device=fwd.device)
        part = mask[..., fwd.past : fwd.past + fwd.length]
        chosen[:, : part.shape[-1]] = part
        return chosen & fwd.real


ScopeLike = Scope | str | slice | tuple[int, int | None] | set[int] | frozenset[int] | Tensor
"""What `Scope.of` takes: a `Scope`, a name, "2:10" or a slice or (2, 10), a set of token ids, or a mask."""
