"""Which part of a prompt to highlight, where nobody says it.

| selector | asks | source |
|---|---|---|
| `key_sentences` | the model itself, for the sentence that answers the question | AutoPASTA, arXiv 2409.10790 |
| `heavy_tokens` | the attention of two passes without any question | LLMSteer, arXiv 2411.13009 |

Shape letters: L layers, H query heads, S tokens of a pass, n tokens of the context, N texts, D width.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.offsets import text_offsets
from steersman.lm.tokens import Prompt
from steersman.steer.edits.attention import AttentionBiasEdit
from steersman.steer.edits.highlight import Heads, heads_by_layer

log = logging.getLogger(__name__)

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to [N, D]: the embeddings whose cosine says how alike two sentences are."""
PREFIXES = ("Read the following text carefully.\n\n", "Here is a document to remember:\n\n")
"""What `heavy_tokens` reads a context behind: neither asks anything."""
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")


@dataclass(frozen=True, kw_only=True)
class KeySentence:
    """The sentence of a context that a model's answer quotes."""

    quoted: str
    """What the model wrote."""
    sentence: str
    """The sentence of the context nearest to it."""
    span: tuple[int, int]
    """Its characters in the context, half-open."""
    score: float
    """How alike the two are: 1 for a faithful quotation."""
    matched: bool
    """Whether the score reaches the threshold."""

    @property
    def spans(self) -> list[str]:
        """What to highlight: the sentence, or nothing where the model quoted none."""
        return [self.sentence] if self.matched else []


def key_sentences(
    lm: LanguageModel,
    contexts: Sequence[str],
    questions: Sequence[str],
    *,
    embed: Embed | None = None,
    threshold: float = 0.5,
    ask: Callable[[str, str], Prompt] | None = None,
    max_new_tokens: int = 128,
) -> list[KeySentence]:
    """Ask the model (greedily) for the sentence of each context that answers its question, and find it there.

    Args:
        lm: the model.
        contexts: N texts.
        questions: N questions.
        embed: how sentences are compared: by the cosine of these embeddings (the source: MiniLM); without it by the F1
            overlap of their words.
        threshold: below this score nothing is highlighted. The source has none: a wrong quotation is then highlighted
            with full force.
        ask: the prompt from context and question; by default a few words around both, as a conversation where the
            model has a chat template.
        max_new_tokens: length of the answer; its first sentence counts.

    Raises SteersmanError for a context without a sentence and lists of different length.
    """
    if len(contexts) != len(questions):
        raise SteersmanError(f"{len(contexts)} contexts and {len(questions)} questions: give one question for each")
    prompts = [(ask or _asker(lm))(context, question) for context, question in zip(contexts, questions)]
    answers = lm.generate(prompts, max_new_tokens=max_new_tokens).completions
    found = [match_sentence(context, answer, embed, threshold) for context, answer in zip(contexts, answers)]
    for one in found:
        done = "highlighted" if one.matched else f"below {threshold:g}: nothing is highlighted"
        log.info("key sentence %r, score %.2f, %s", one.sentence[:60], one.score, done)
    return found


def _asker(lm: LanguageModel) -> Callable[[str, str], Prompt]:
    chat = getattr(lm.tokenizer, "chat_template", None) is not None

    def ask(context: str, question: str) -> Prompt:
        wish = f"{context}\n\nQuestion: {question}\nCopy the one sentence of the text above that answers the question."
        return [{"role": "user", "content": wish}] if chat else f"{wish}\nSentence:"

    return ask


def sentences(text: str) -> list[tuple[int, int]]:
    """The characters of each sentence: it ends with a full stop, question or exclamation mark, or with its line.

    >>> sentences("One. Two and 3.5? ")
    [(0, 4), (5, 17)]
    """
    found, start = [], 0
    for end in [*(match.span() for match in _END.finditer(text)), (len(text), len(text))]:
        if (part := text[start : end[1]]).strip():
            begin = start + len(part) - len(part.lstrip())
            found.append((begin, start + len(part.rstrip())))
        start = end[1]
    return found


def match_sentence(context: str, quoted: str, embed: Embed | None = None, threshold: float = 0.5) -> KeySentence:
    """The sentence of `context` nearest to the first one of `quoted`."""
    parts = sentences(context)
    if not parts:
        raise SteersmanError("a context without a sentence has none to highlight")
    own = [context[start:stop] for start, stop in parts]
    first = next(iter(sentences(quoted)), (0, 0))
    wanted = quoted[first[0] : first[1]].strip("\"' ")
    if not wanted:
        scores = [0.0] * len(own)
    elif embed is None:
        scores = [_overlap(wanted, sentence) for sentence in own]
    else:
        x = torch.as_tensor(embed([wanted, *own])).float()
        if x.ndim != 2 or len(x) != 1 + len(own):
            raise SteersmanError(f"embed must give one row for each of {1 + len(own)} texts, got {tuple(x.shape)}")
        scores = torch.cosine_similarity(x[1:], x[:1]).tolist()
    best = max(range(len(own)), key=lambda i: scores[i])
    return KeySentence(
        quoted=quoted, sentence=own[best], span=parts[best], score=scores[best], matched=scores[best] >= threshold
    )


def _overlap(a: str, b: str) -> float:
    """F1 of the words of two sentences, as multisets."""
    x, y = (Counter(re.findall(r"\w+", text.lower())) for text in (a, b))
    total = x.total() + y.total()
    return 2 * (x & y).total() / total if total else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class HeavyTokens:
    """The tokens of a context that each head looks at most, in two passes without a question."""

    context: str
    """The text."""
    characters: list[tuple[int, int]]
    """The characters of each of its n tokens."""
    chosen: Tensor
    """[L, H, n] bool: among the k heaviest in both passes."""
    k: int
    """How many each pass named for each head."""

    @property
    def overlap(self) -> Tensor:
        """[L, H]: how many tokens both passes named. Chance gives k^2 / n: see `by_chance`."""
        return self.chosen.sum(-1)

    @property
    def by_chance(self) -> float:
        """k^2 / n: the overlap to expect of two passes that have nothing to do with each other."""
        return self.k**2 / len(self.characters)


def heavy_tokens(
    lm: LanguageModel, context: str, *, k: int | None = None, prefixes: tuple[str, str] = PREFIXES
) -> HeavyTokens:
    """The context's tokens among the k (by default a tenth) with most attention in both of two passes, behind each of
    two prefixes that ask nothing; per layer and head.

    A token's weight is the mean over the context's tokens that can see it, not the sum: early tokens are seen by more.
    Raises SteersmanError where the context's tokens change with what stands before them, and for a model that does not
    return its attention.
    """
    weights, characters = [], None
    for prefix in prefixes:
        offsets = text_offsets(lm, prefix + context)
        inside = [i for i, (start, stop) in enumerate(offsets.characters) if stop > max(start, len(prefix))]
        there = [offsets.characters[i] for i in inside]
        own = [(max(0, start - len(prefix)), stop - len(prefix)) for start, stop in there]
        if characters not in (None, own):
            raise SteersmanError("the context's tokens change with the prefix: begin it at the start of a line")
        characters = own
        weights.append(column_weights(_attention(lm, offsets.ids), inside[0]))
    assert characters is not None
    k = max(1, len(characters) // 10) if k is None else k
    return HeavyTokens(context=context, characters=characters, chosen=heavy_columns(*weights, k=k), k=k)


def column_weights(attention: Tensor, start: int) -> Tensor:
    """[L, H, n]: the mean weight that the queries from column `start` on give to each of their columns, over those that
    see it, from weights [L, H, S, S]."""
    part = attention[..., start:, start:]
    n = part.shape[-1]
    return part.sum(-2) / torch.arange(n, 0, -1, device=part.device)


def heavy_columns(a: Tensor, b: Tensor, *, k: int) -> Tensor:
    """[..., n] bool: the columns among the k largest of a and of b, both [..., n]."""
    if not 1 <= k <= a.shape[-1]:
        raise SteersmanError(f"k must be between 1 and the {a.shape[-1]} tokens of the context, got {k}")
    named = [torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.topk(k, -1).indices, True) for x in (a, b)]
    return named[0] & named[1]


@torch.no_grad()
def _attention(lm: LanguageModel, ids: Sequence[int]) -> Tensor:
    """[L, H, S, S] fp32, from one pass with the implementation that returns its weights."""
    before = lm.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        with lm.unedited():
            out = lm.model(torch.tensor([list(ids)], device=lm.device), output_attentions=True, use_cache=False)
    finally:
        lm.model.set_attn_implementation(before)
    found: Any = out.attentions
    if not found or any(weights is None for weights in found):
        raise SteersmanError(f"{lm.name} does not return the attention of every layer: its tokens cannot be weighed")
    return torch.stack([weights[0].float() for weights in found])


def heavy_edits(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    heavy: Sequence[HeavyTokens],
    *,
    factor: float = 2.0,
    heads: Heads = None,
) -> Mapping[str, AttentionBiasEdit]:
    """{hook point: edit} under which chosen heads give the heavy tokens of each prompt's context `factor` times the
    weight (before it is normalised again): + log(factor) on the keys of each head's own tokens.

    Each prompt must hold the context that its `heavy` was found in. Whether the source normalises again is not stated.
    """
    if len(prompts) != len(heavy) or factor <= 0:
        raise SteersmanError("give the heavy tokens of each prompt's context, and a factor above 0")
    offsets = [text_offsets(lm, prompt) for prompt in prompts]
    layers = heads_by_layer(lm, heads)
    width = max(len(one.ids) for one in offsets)
    table = torch.zeros(len(prompts), *heavy[0].chosen.shape[:2], width, dtype=torch.bool)
    for row, (one, found) in enumerate(zip(offsets, heavy)):
        start = one.text.find(found.context)
        if start < 0:
            raise SteersmanError(f"prompt {row} does not hold the context that its heavy tokens are of")
        for i, (begin, end) in enumerate(found.characters):
            for position in one.positions([(start + begin, start + end)]):
                table[row, :, :, position] |= found.chosen[..., i].cpu()
    return {
        f"blocks.{layer}.hook_attn_mask": AttentionBiasEdit(math.log(factor), table[:, layer], chosen)
        for layer, chosen in layers.items()
    }
