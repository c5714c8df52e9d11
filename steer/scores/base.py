"""What a feature score is: a number for every feature of an SAE, measured from what it says that it needs.

A subclass of `Score` that says its `name` is found under it, wherever it is written:

>>> class DecoderNorm(Score):
...     name, source, unit = "decoder_norm", "an example", "norm of the decoder row"
...     def measure(self, evidence, at):
...         return evidence.column(self, at, evidence.saes[at].W_dec.norm(dim=1), n=1)
>>> SCORES["decoder_norm"] is DecoderNorm
True

Shape letters: L features, P permutations.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steersman.config import check_types
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.registry import Registry
from steersman.sae import SAE
from steersman.steer.scores.reading import Labelled, Pool, pooled_sums
from steersman.steer.scores.statistics import LabelSums, null_quantiles
from steersman.steer.scores.table import Column

NEUTRAL_PROMPTS = ("From my experience,", "I think that", "The next thing is", "We went there and")
"""What the model is asked to go on from where nothing should be suggested; the first is that of arXiv 2505.20063."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How features are scored."""

    prompts: tuple[str, ...] = NEUTRAL_PROMPTS
    """output: neutral prompts, over which it is averaged."""
    factor: float = 10.0
    """output: how far each feature is turned up, in `units`."""
    units: Literal["max_act", "norm_frac", "raw"] = "max_act"
    """output: what the factor multiplies: the feature's largest activation in training, the strength at which it adds a
    state of median norm, or one unit of activation."""
    n_tokens: int = 20
    """output, input: tokens that the logit lens gives for a feature."""
    n_examples: int = 20
    """input: most activating tokens of a feature that are compared with those."""
    null_directions: int = 32
    """output: random directions of the features' lengths that make its null."""
    permutations: int = 100
    """correlation, f_statistic, contrast, input, flow: permutations that make the null."""
    level: float = 0.95
    """Quantile of the null that is reported."""
    pool: Pool | None = None
    """correlation, f_statistic, contrast: how the tokens of one text become one number, max or mean; by default what
    the score's paper does."""
    feature: tuple[int, ...] = ()
    """output: the features to measure, where all would take long; the others' score is not a number."""
    batch_size: int = 16
    """Texts per pass; output: features per pass."""
    max_length: int | None = None
    """Cut texts to this many tokens, BOS included."""
    seed: int = 0
    """Seed of permutations and random directions."""

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("n_tokens", "n_examples", "null_directions", "permutations", "batch_size")
        for name in counts:
            if getattr(self, name) < (0 if name in ("null_directions", "permutations") else 1):
                raise SteersmanError(f"{name} is too small: {getattr(self, name)}")
        if not 0 < self.level < 1:
            raise SteersmanError(f"level must lie between 0 and 1, got {self.level}")
        if not math.isfinite(self.factor) or not self.prompts:
            raise SteersmanError("the output score needs a finite factor and at least one prompt")


NEEDS = {
    "labelled": "positive= and negative= texts (or (prompt, answer) pairs), or rewarded= answers",
    "texts": "texts to read the features on",
    "saes": "SAEs at several hook points of the model",
}
"""What a score may need, and how to give it."""


class Evidence:
    """What scores are measured from: the model, SAEs at its hook points, and texts; what several scores need of it is
    read once."""

    def __init__(
        self,
        lm: LanguageModel,
        saes: Sequence[SAE],
        hooks: Sequence[str],
        config: ScoreConfig,
        labelled: Sequence[Labelled] | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        self.lm, self.saes, self.hooks, self.config = lm, list(saes), list(hooks), config
        self.labelled = labelled
        self.texts = texts

    @cached_property
    def _sums(self) -> dict[tuple[int, Pool], LabelSums]:
        return pooled_sums(
            self.lm, self.saes, self.hooks, self.labelled or [], permutations=self.config.permutations,
            seed=self.config.seed, batch_size=self.config.batch_size, max_length=self.config.max_length,
        )  # fmt: skip

    def sums(self, at: int, default: Pool) -> LabelSums:
        """The sums over the labelled texts for SAE number `at`, pooled as the configuration says or by `default`."""
        return self._sums[at, self.config.pool or default]

    def column(
        self,
        score: "Score",
        at: int,
        values: Tensor,
        *,
        n: int,
        null: Tensor | None = None,
        null_max: float = math.nan,
        strengths: Tensor | None = None,
        **about: Any,
    ) -> Column:
        """The column of a score for SAE number `at`; a null that was not made is not a number."""
        wanted = self.saes[at].cfg.d_sae
        null = torch.full((wanted,), math.nan) if null is None else null
        settings = {key: value for key, value in asdict(self.config).items() if key in score.settings}
        return Column(
            values=values, null=null, null_max=null_max, strengths=strengths, unit=score.unit, n=n,
            level=self.config.level, about={"score": score.name, "source": score.source, **settings, **about},
        )  # fmt: skip

    def permuted_column(self, score: "Score", at: int, statistic: Tensor, *, n: int, **about: Any) -> Column:
        """The column of a statistic [L, 1 + P], whose further columns are those of permuted labels."""
        null, null_max = null_quantiles(statistic[:, 1:], self.config.level)
        return self.column(score, at, statistic[:, 0], n=n, null=null, null_max=null_max, **about)


class Score(ABC):
    """A score of features. A subclass is found by its `name`."""

    name: ClassVar[str] = ""
    """What the table calls it."""
    source: ClassVar[str] = ""
    """Paper or authors."""
    unit: ClassVar[str] = ""
    """What its values are in."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Names of `NEEDS`, without which it cannot be measured."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `ScoreConfig` that it reads: recorded with it."""

    def __init_subclass__(cls) -> None:
        SCORES.register(cls, cls)

    @abstractmethod
    def measure(self, evidence: Evidence, at: int) -> Column:
        """The score of every feature of SAE number `at` of the evidence."""

    def check(self, evidence: Evidence) -> None:  # noqa: B027 (most need no more than `needs` says)
        """Raise SteersmanError, before anything is run, for evidence that the score cannot be measured from."""


SCORES: Registry[type[Score]] = Registry("score")
"""Every score by name, one file each."""


def check_given(names: Sequence[str], given: Mapping[str, bool]) -> list[Score]:
    """The scores of these names. Raises SteersmanError for an unknown one, for none, and for one that needs what is not
    given, by the names of `NEEDS`."""
    chosen = [SCORES[name]() for name in names]
    if not chosen:
        raise SteersmanError(f"name at least one score: {', '.join(SCORES)}")
    for score in chosen:
        if lacking := [name for name in score.needs if not given[name]]:
            raise SteersmanError(f"score {score.name!r} needs {' and '.join(NEEDS[name] for name in lacking)}")
    return chosen
