"""What the hooks of a forward pass know about it: which tokens it holds, and where they stand in the text.

Columns count slots of the (padded) sequence from its start; positions count real tokens, so that left padding, right
padding and no padding give a token the same position. `clock` makes a `ForwardPass` for every pass.
"""

import copy
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.errors import SteersmanError


class GenerationRun:
    """What the clock knows about one call of `model.generate`: its prompt, whose tokens those are, and which tokens end
    a row."""

    def __init__(
        self,
        rows: int,
        prompt_columns: int,
        mask: Tensor | None,
        stop_ids: list[int],
        beams: int,
        spans: Any = None,
    ) -> None:
        self.rows = rows
        self.prompt_columns = prompt_columns
        self.mask = mask
        self.stop_ids = stop_ids
        self.beams = beams
        self.spans = spans
        self.history: Tensor | None = None  # [B, T] all tokens so far
        self.unfinished: Tensor | None = None  # [B, 1] bool: rows not ended before this pass; kept only under a cache
        self.passes = 0
        self.seen = 0  # columns that its passes have covered
        self.sequence = 0  # its number among the texts that the clock has seen
        self.input_ids: Tensor | None = None  # [rows, P]: the prompt, where it was given as tokens
        self.memo: dict[Any, Any] = {}  # what is found out about the prompt and holds for all of it

    def expanded_mask(self, batch: int) -> Tensor:
        """The prompt's mask [B, P], its rows repeated as beams and returned sequences repeat the prompts."""
        assert self.mask is not None
        return self.mask.repeat_interleave(batch // self.mask.shape[0], dim=0)


class ForwardPass:
    """One forward pass of the model, as the hooks see it. B rows, S tokens in this pass.

    A token is of the prompt when `generate` received it; in a plain forward pass every token is, unless
    `LanguageModel.prompt_length` declares where the prompt ends. `spans` says whose the tokens of conversations are
    (`steersman.lm.chat_spans`), and `history` [B, T] holds all tokens so far; each is None where it is not known.
    """

    def __init__(
        self,
        *,
        input_ids: Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
        past: int,
        mask: Any,
        prompt_columns: int,
        declared: Tensor | None,
        bos_id: int | None,
        sequence: int,
        run: GenerationRun | None,
        edits: Iterable[Any] = (),
        spans: Any = None,
    ) -> None:
        self.input_ids = input_ids
        self.batch, self.length = shape
        self.device = device
        self.past = past
        self.given_mask = mask
        self.prompt_columns = prompt_columns
        self.declared = declared
        self.bos_id = bos_id
        self.sequence = sequence
        self.run = run
        self.spans = spans
        self.history = input_ids if run is None or past == 0 else run.history
        self.unfinished: Tensor | None = None  # [B, S] bool: before the end of the row's text, where it can end
        self.reached: dict[Any, bool] = dict.fromkeys(edits, False)  # the edits that apply to it, and which have run
        self.memo: dict[Any, Any] = {}  # what the hooks of this pass compute once and share
        self._whole: ForwardPass | None = None
        if run is not None and run.stop_ids and self.phase != "prompt" and self.batch > 1 and input_ids is not None:
            self.unfinished = self._find_unfinished(run, input_ids)

    def _find_unfinished(self, run: GenerationRun, ids: Tensor) -> Tensor:
        """[B, S] bool: tokens before the end of their row's text. generate feeds finished rows on as padding that the
        attention mask calls real.

        The end token is out too: a row generated alone stops before it is ever fed.
        """
        on = ids != run.stop_ids[0]
        for stop in run.stop_ids[1:]:
            on = on & (ids != stop)
        if self.phase == "mixed":
            on = on | (torch.arange(self.past, self.past + self.length, device=ids.device) < self.prompt_columns)
        if self.length > 1:
            on = on.cummin(1).values
        if run.beams > 1 or self.past == 0:
            return on  # beams change places between steps; without a cache the pass holds its own history
        if run.unfinished is not None:
            on = on & run.unfinished
        run.unfinished = on[:, -1:]
        return on

    @cached_property
    def phase(self) -> Literal["prompt", "generation", "mixed"]:
        """What the pass holds, known without looking at the device."""
        if self.declared is not None:
            return "mixed"
        if self.past >= self.prompt_columns:
            return "generation"
        return "prompt" if self.past + self.length <= self.prompt_columns else "mixed"

    def last(self, n: int) -> "ForwardPass":
        """The pass as its last n tokens have it: logits are often computed for these alone."""
        if n == self.length:
            return self
        key = (ForwardPass.last, n)
        if key not in self.memo:
            part = copy.copy(self)
            for name in _PER_TOKEN:
                part.__dict__.pop(name, None)
            part._whole = self
            part.past, part.length, part.memo = self.past + self.length - n, n, {}
            part.input_ids = None if self.input_ids is None else self.input_ids[:, -n:]
            part.unfinished = None if self.unfinished is None else self.unfinished[:, -n:]
            self.memo[key] = part
        return self.memo[key]

    @property
    def whole(self) -> "ForwardPass":
        """The pass of which this is the `last` part, or this."""
        return self if self._whole is None else self._whole

    @property
    def _follows_prompt(self) -> bool:
        """True when every token is one that generate made: its attention mask holds ones only there."""
        return self.phase == "generation" and self.run is not None

    @property
    def all_real(self) -> bool:
        """True when it is known, without looking at the device, that no token of this pass is padding."""
        return self.unfinished is None and (self._follows_prompt or self.mask is None)

    @cached_property
    def mask(self) -> Tensor | None:
        """[B, >= past + S] of 0 and 1: the attention mask over all columns so far; None when no token is padding."""
        given, seen = self.given_mask, self.past + self.length
        if isinstance(given, Tensor) and given.ndim == 2:
            if given.shape[1] >= seen:
                return given
            raise SteersmanError(
                f"attention_mask covers {given.shape[1]} tokens, but {self.past} are cached and {self.length} are new"
            )
        # Static caches get a prepared mask, and some passes none: go back to the one that generate was given.
        if self.run is not None and self.run.mask is not None:
            known = self.run.expanded_mask(self.batch)
            rest = known.new_ones(self.batch, max(0, seen - known.shape[1]))
            return torch.cat([known, rest], dim=1)
        if given is None:
            return None
        raise SteersmanError("edits need a two-dimensional attention_mask [B, S] to tell padding from text")

    @cached_property
    def present(self) -> Tensor:
        """[B, S] bool: tokens that the attention mask calls real."""
        if self.mask is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        return self.mask[:, self.past : self.past + self.length].bool()

    @cached_property
    def real(self) -> Tensor:
        """[B, S] bool: real tokens, neither padding nor what `generate` fills a finished row with."""
        if self.unfinished is None:
            return self.present
        return self.unfinished if self._follows_prompt else self.present & self.unfinished

    @cached_property
    def positions(self) -> Tensor:
        """[B, S] int64: absolute position, counting real tokens from 0; -1 for padding."""
        if self.mask is None:
            row = torch.arange(self.past, self.past + self.length, device=self.device)
            return row.expand(self.batch, -1)
        counted = self.mask.long().cumsum(1)[:, self.past : self.past + self.length] - 1
        return counted.masked_fill(~self.present, -1)

    @cached_property
    def key_positions(self) -> Tensor:
        """[B, past + S] int64: `positions` of every token so far, cached ones too: the keys that attention looks at."""
        seen = self.past + self.length
        if self.mask is None:
            return torch.arange(seen, device=self.device).expand(self.batch, -1)
        mask = self.mask[:, :seen]
        return (mask.long().cumsum(1) - 1).masked_fill(~mask.bool(), -1)

    @cached_property
    def prompt_length(self) -> Tensor:
        """[B] int64: number of real tokens in the prompt of each row."""
        if self.declared is not None:
            return self.declared
        # The prompt's own mask comes first: a chunk of a long prompt is given a mask that ends with the chunk.
        mask = self.mask if self.run is None or self.run.mask is None else self.run.expanded_mask(self.batch)
        if mask is None:
            return torch.full((self.batch,), self.prompt_columns, device=self.device)
        unseen = max(0, self.prompt_columns - mask.shape[1])
        return mask[:, : self.prompt_columns].long().sum(1) + unseen

    @cached_property
    def steps(self) -> Tensor:
        """[B, S] int64: which generated token is chosen from each token's output: 0 at the last token of the prompt, 1
        at the first generated token, ...; negative before, and for padding."""
        return self.positions - (self.prompt_length[:, None] - 1)

    @cached_property
    def in_prompt(self) -> Tensor:
        """[B, S] bool: real tokens of the prompt."""
        return self.real & (self.positions < self.prompt_length[:, None])

    @cached_property
    def generated(self) -> Tensor:
        """[B, S] bool: real tokens after the prompt."""
        return self.real & (self.positions >= self.prompt_length[:, None])

    @cached_property
    def is_bos(self) -> Tensor:
        """[B, S] bool: beginning-of-sequence tokens, the first of a row where it is the BOS (position 0 when only
        embeddings are known). The same id further on is text, such as the turn token of a chat."""
        if self.bos_id is None:
            return torch.zeros(self.batch, self.length, dtype=torch.bool, device=self.device)
        first = self.real & (self.positions == 0)
        return first if self.input_ids is None else first & (self.input_ids == self.bos_id)

    def row_index(self, rows: int, what: str = "the edit") -> Tensor | None:
        """[B] int64: which of `rows` rows of parameters each row of the pass uses; None when they are the same rows.

        Beams and `num_return_sequences` expand each prompt to neighbouring rows. Raises SteersmanError otherwise.
        """
        given = self.run.rows if self.run is not None else self.batch
        if rows != given or self.batch % given:
            raise SteersmanError(
                f"{what} has {rows} rows and the batch has {given}: give one row per prompt, or one row for all"
            )
        if given == self.batch:
            return None
        return torch.arange(given, device=self.device).repeat_interleave(self.batch // given)


_PER_TOKEN = [name for name, value in vars(ForwardPass).items() if isinstance(value, cached_property)]
