"""`sae_ssv`: a vector of few features of an SAE, trained to move negative texts to the positives.

1. The `candidates` features with the largest F statistic between the sides, over texts (means over tokens).
2. `probes` logistic regressions on random halves of the texts; their mean weight ranks the candidates, and the fewest
   of them that tell held-out texts apart as well as any number does are kept.
3. v = mu+ - mu- on those, of norm 1, then trained with the loss `Separation`: 100 steps, lr 0.05, batches of 64.

The vector is W_dec^T v in the residual stream, added to the state: the SAE's error stays, where the paper's steering
decodes z + v and so loses it. Source: arXiv 2505.16188 (scales 1 to 10 at test). `distance="linear"` is the paper's
distance, with the trap that `Separation` describes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.lm.origin import check_sae_fits
from steersman.ranking import auroc
from steersman.sae import SAE
from steersman.steer.edits import VectorEdit
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.methods.logistic import fit_logistic
from steersman.steer.scores.statistics import f_statistic
from steersman.steer.training.loop import TrainEditConfig, train_edit
from steersman.steer.training.losses import Separation, feature_means
from steersman.steer.vectors.vector import SteeringVector

CONFIG = TrainEditConfig(lr=0.05, epochs=100, batch_size=64)
ALIKE = 1e-3  # AUROC by which fewer features may be worse than the best number


def sae_ssv(
    lm: LanguageModel,
    sae: SAE,
    positive: ExamplesLike,
    negative: ExamplesLike,
    *,
    hook: HookName | None = None,
    features: Sequence[int] | None = None,
    candidates: int = 128,
    probes: int = 50,
    distance: Literal["margin", "linear"] = "margin",
    likelihood: float = 0.5,
    l1: float = 0.01,
    config: TrainEditConfig = CONFIG,
) -> SteeringVector:
    """The trained vector at the SAE's hook point, from as many texts of each side; pair i is the text to be steered and
    the text that it should become.

    `features` takes the place of the selection. `candidates` and `probes` are those of steps 1 and 2, the rest are the
    settings of the loss (see `Separation`) and the loop. The notes hold the features with their coefficients. Raises
    SteersmanError for sides of different length, an SAE of another model, and one whose features' directions are scaled
    per token.
    """
    where = check_sae_fits(lm, sae, hook)
    if sae.cfg.input_norm != "none":
        raise SteersmanError(f"this SAE scales its directions per token ({sae.cfg.input_norm}): they make no vector")
    sides = as_examples(positive, "positive"), as_examples(negative, "negative")
    Examples(positive=sides[0], negative=sides[1]).check_pairs("sae_ssv")
    means = feature_means(lm, sae, where, sides)
    chosen = (
        list(features) if features is not None else select_features(means[0], means[1], candidates, probes, config.seed)
    )
    difference = (means[0] - means[1]).mean(0)[chosen]
    if not float(difference.norm()) > 0:
        raise SteersmanError("the chosen features have the same means on both sides: nothing separates them")
    directions = sae.W_dec[chosen].detach().float().to(lm.device)  # [d, D]
    loss = Separation(*sides, sae=sae, hook=where, features=chosen, distance=distance, likelihood=likelihood, l1=l1)
    found = train_edit(
        lm,
        {"v": difference / difference.norm()},
        lambda p: {where: VectorEdit(p["v"] @ directions)},
        loss,
        config=config,
    )
    v = found.parameters["v"]
    metadata = {
        "source": "arXiv 2505.16188",
        "model_type": getattr(lm.config, "model_type", ""),
        **found.notes(),
        "features": {str(j): float(c) for j, c in zip(chosen, v.tolist())},
        "distance": distance,
    }
    return SteeringVector.of(
        v @ directions.cpu(), hook_name=where, model_name=lm.name, method="sae_ssv", metadata=metadata
    )


def select_features(plus: Tensor, minus: Tensor, candidates: int = 128, probes: int = 50, seed: int = 0) -> list[int]:
    """Steps 1 and 2 of the module, from the mean features of each side's texts [n, L] -> feature ids, best first.

    Raises SteersmanError for fewer than four texts of a side, and where no feature differs.
    """
    if min(len(plus), len(minus)) < 4:
        raise SteersmanError(f"features are chosen from 4 texts a side at least, got {len(plus)} and {len(minus)}")
    x = torch.cat([plus, minus]).double()
    label = torch.cat([torch.ones(len(plus)), torch.zeros(len(minus))]).bool()
    f = f_statistic(x, label)
    k = min(candidates, int((f > 0).sum()))
    if not k:
        raise SteersmanError("no feature has different means on the two sides")
    ids = f.nan_to_num(posinf=torch.finfo(torch.float64).max).topk(k).indices
    z = x[:, ids]
    z = (z - z.mean(0)) / z.std(0).clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    weight, held = torch.zeros(k, dtype=torch.float64), []
    for _ in range(probes):
        order = [torch.randperm(len(side), generator=generator) for side in (plus, minus)]
        fit = torch.cat([order[0][: len(plus) // 2], len(plus) + order[1][: len(minus) // 2]])
        rest = torch.cat([order[0][len(plus) // 2 :], len(plus) + order[1][len(minus) // 2 :]])
        part = z[fit][:, None], label[fit]
        found = fit_logistic(lambda part=part: [part], l2=0.01).weight[0]
        weight += found / probes
        held.append((found, rest))
    rank = weight.abs().argsort(descending=True)
    score = torch.zeros(k, dtype=torch.float64)
    for found, rest in held:
        along = (z[rest][:, rank] * found[rank]).cumsum(1)  # [n, d]: with the d best ranked
        score += auroc(along, label[rest][:, None])[:, 0] / probes
    fewest = int((score >= score.max() - ALIKE).nonzero()[0, 0]) + 1
    return ids[rank[:fewest]].tolist()
