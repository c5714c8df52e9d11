"""How well a direction, or a feature, finds a concept in texts: AxBench's concept detection.

The latent of a token is h . v / |v| (or the feature's activation), that of a text the largest over its tokens: all but
the BOS, or those of the answer where an example has a prompt. What is reported is the AUROC of texts with the concept
against texts without it, and against hard negatives (texts of related concepts) apart. Source: arXiv 2501.17148.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.ranking import auroc
from steersman.sae import SAE
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.methods.reading import Reader
from steersman.steer.vectors.directions import directions_of
from steersman.steer.vectors.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How a direction tells texts with a concept from texts without."""

    auroc: float
    """Against the negatives."""
    auroc_hard: float | None
    """Against the hard negatives; None without any."""
    auroc_all: float
    """Against both together."""
    positive: list[float]
    """Largest latent of each text with the concept."""
    negative: list[float]
    """Of each without it."""
    hard_negative: list[float]
    """Of each hard negative."""


def detect_concept(
    lm: LanguageModel,
    reads: SteeringVector | tuple[SAE, int],
    positive: ExamplesLike,
    negative: ExamplesLike,
    hard_negative: ExamplesLike = (),
    *,
    batch_size: int = 16,
    max_length: int | None = None,
) -> Detection:
    """Score texts by a vector at one hook point, or by an SAE's feature.

    Raises SteersmanError for a vector of another model, of several hook points or with a row per position, a feature
    out of range, and sides without texts.
    """
    if isinstance(reads, SteeringVector):
        reads.check_not_zero("detection by it")
        (hook,) = directions_of(lm, reads, None) if len(reads.directions) == 1 else (reads.hook_name,)
        v = reads.vector / reads.vector.norm()

        def latent(x: Tensor) -> Tensor:
            return x @ v
    else:
        sae, feature = reads
        sae.check_feature(feature)
        hook = check_sae_fits(lm, sae, None)

        def latent(x: Tensor) -> Tensor:
            ids = torch.tensor([feature], device=sae.W_dec.device)
            return sae.encode_features(x.to(sae.W_dec.device), ids)[:, 0].detach().float().cpu()

    given = {"positive": positive, "negative": negative, "hard negative": hard_negative}
    sides = {name: as_examples(texts, name) for name, texts in given.items()}
    if not sides["positive"] or not sides["negative"]:
        raise SteersmanError("detection needs texts with the concept and texts without it")
    scores: dict[str, Tensor] = {}
    for name, examples in sides.items():
        found = torch.full((len(examples),), float("-inf"))
        for answers in (False, True):
            where = torch.tensor([i for i, e in enumerate(examples) if bool(e.prompt) == answers], dtype=torch.int64)
            chosen = Examples(positive=[examples[i] for i in where.tolist()], negative=[])
            positions = "answer" if answers else "all"
            reader = Reader(
                lm, [hook], positions=positions, every_token=True, batch_size=batch_size, max_length=max_length
            )
            for batch in reader.samples(chosen, "sides"):
                part = batch.at(hook)
                found.scatter_reduce_(0, where[part.unit], latent(part.x), "amax")
        scores[name] = found
    plus, minus, hard = scores["positive"], scores["negative"], scores["hard negative"]
    return Detection(
        auroc=_auroc(plus, minus),
        auroc_hard=_auroc(plus, hard) if len(hard) else None,
        auroc_all=_auroc(plus, torch.cat([minus, hard])),
        positive=plus.tolist(),
        negative=minus.tolist(),
        hard_negative=hard.tolist(),
    )


def _auroc(plus: Tensor, minus: Tensor) -> float:
    labels = torch.cat([torch.ones(len(plus)), torch.zeros(len(minus))]).bool()
    return float(auroc(torch.cat([plus, minus])[:, None], labels[:, None]))
