"""Where particles take their next-token distributions from. Any `Source` will do: a model's cached streams, a Markov
chain of a test, a mixture.

Shape letters: R rows (particles of all prompts), K candidates that are looked at ahead, V vocabulary, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from steersman.lm import ForwardPass, LanguageModel
from steersman.lm.session import Session
from steersman.lm.tokens import TokenBatch

Context = Callable[[], AbstractContextManager[Any]]


class Source(Protocol):
    """R streams of text that can be continued, copied and dropped."""

    @property
    def passes(self) -> int:
        """Passes of the model so far."""
        ...

    @property
    def rows(self) -> int:
        """Rows of all passes so far."""
        ...

    def log_probs(self) -> Tensor:
        """[R, V] floating point: log-probabilities of the next token of each row."""
        ...

    def advance(self, parents: Tensor, tokens: Tensor) -> None:
        """Row i becomes row `parents[i]` as it was, followed by `tokens[i]`; both [R] int64."""
        ...


class LooksAhead(Protocol):
    """A source that can say the hidden states after tokens that are not chosen yet."""

    def peek(self, candidates: Tensor) -> Tensor:
        """[R, K, D]: states after each of `candidates` [R, K]. The next `advance` takes one of them in each row."""
        ...


class StatesReader:
    """The last token's states at hook points, from the passes made inside `open_`."""

    def __init__(self, lm: LanguageModel, hooks: Sequence[str], context: Context | None = None) -> None:
        self.lm, self.hooks, self.context = lm, list(dict.fromkeys(hooks)), context
        self.states: dict[str, Tensor] = {}

    @contextmanager
    def open_(self) -> Iterator[None]:
        """`context`, and inside it readers that see what its edits leave."""
        with ExitStack() as stack:
            if self.context is not None:
                stack.enter_context(self.context())
            for hook in self.hooks:
                stack.enter_context(self.lm.edit(hook, self._reader(hook)))
            yield

    def _reader(self, hook: str) -> Callable[[Tensor, ForwardPass], Tensor]:
        def read(h: Tensor, _fwd: ForwardPass) -> Tensor:
            self.states[hook] = h[:, -1].detach()
            return h

        return read


class SessionSource:
    """Cached streams of a language model: `copies` of each prompt, side by side.

    `context` is opened around each pass: what it steers is this source's. `states` holds {hook: [R, D]} of the token
    that was fed last, at the hook points `hooks`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: TokenBatch,
        copies: int,
        *,
        context: Context | None = None,
        hooks: Sequence[str] = (),
    ) -> None:
        self.reader = StatesReader(lm, hooks, context)
        opened = self.reader.open_ if context is not None or self.reader.hooks else None
        self.session = Session(lm, prompts, copies=copies, context=opened)
        self.passes, self.rows = 1, len(prompts.input_ids)

    @property
    def states(self) -> dict[str, Tensor]:
        return self.reader.states

    def log_probs(self) -> Tensor:
        return self.session.logits.log_softmax(-1)

    def advance(self, parents: Tensor, tokens: Tensor) -> None:
        if not bool((parents == torch.arange(len(parents))).all()):
            self.session.reorder(parents)
        self.feed(tokens)

    def feed(self, tokens: Tensor) -> None:
        self.session.feed(tokens)
        self.passes, self.rows = self.passes + 1, self.rows + len(tokens)


class LookaheadSource:
    """Cached streams that are kept K times each, so that one pass looks at K candidates of every row; the chosen one's
    next-token distribution is known with it."""

    def __init__(self, lm: LanguageModel, prompts: TokenBatch, copies: int, k: int, **options: Any) -> None:
        self.k = k
        self.inner = SessionSource(lm, prompts, copies * k, **options)
        self.row = torch.arange(len(prompts.input_ids) * copies) * k  # the inner row that stands for each
        self.candidates: Tensor | None = None
        self.states: dict[str, Tensor] = {}

    @property
    def passes(self) -> int:
        return self.inner.passes

    @property
    def rows(self) -> int:
        return self.inner.rows

    def log_probs(self) -> Tensor:
        return self.inner.session.logits[self.row.to(self.inner.session.logits.device)].log_softmax(-1)

    def peek(self, candidates: Tensor) -> Tensor:
        """The states [R, K, D] after `candidates` [R, K], at the first of the hook points."""
        self.inner.session.reorder(self.row.repeat_interleave(self.k))
        self.inner.feed(candidates.flatten())
        self.candidates = candidates.cpu()
        self.row = torch.arange(len(candidates)) * self.k
        hook = self.inner.reader.hooks[0]
        return self.inner.states[hook].unflatten(0, candidates.shape)

    def advance(self, parents: Tensor, tokens: Tensor) -> None:
        assert self.candidates is not None, "peek comes first"
        place = (self.candidates[parents] == tokens[:, None]).long().argmax(1)  # 0 in rows that are finished
        self.row = parents * self.k + place
        self.states = {hook: h[self.row.to(h.device)] for hook, h in self.inner.states.items()}
        self.candidates = None


class ExchangeSource:
    """Streams with a prompt of their own each, of which a row may take another's text and keep its prompt: then all
    are read again. Texts are exchanged as tokens."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[Sequence[int]], context: Context | None = None) -> None:
        self.lm, self.prompts, self.context = lm, [list(prompt) for prompt in prompts], context
        self.texts: list[list[int]] = [[] for _ in prompts]
        self.passes = self.rows = 0
        self._read()

    def _read(self) -> None:
        whole = [prompt + text for prompt, text in zip(self.prompts, self.texts)]
        batch = self.lm.encode(whole, padding_side="left")
        self.source = SessionSource(self.lm, batch, 1, context=self.context)
        self.passes, self.rows = self.passes + 1, self.rows + len(whole)

    def log_probs(self) -> Tensor:
        return self.source.log_probs()

    def advance(self, parents: Tensor, tokens: Tensor) -> None:
        before = self.texts
        self.texts = [[*before[p], t] for p, t in zip(parents.tolist(), tokens.tolist())]
        if all(self.texts[i][:-1] == before[i] for i in range(len(before))):
            self.source.feed(tokens)
            self.passes, self.rows = self.passes + 1, self.rows + len(tokens)
        else:
            self._read()
