"""Trained vectors on a model in which a direction is a concept: what is planted is found, and steers."""

from typing import Any

import pytest
import torch
from support.concept_lm import LAST, Planted, concept_lm
from support.tiny_models import D, toy_sae

from steersman import SteeringVector
from steersman.demo import MODEL_PATH, texts
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer import METHODS, Steerer, contrast
from steersman.steer.evaluation import Detection, detect_concept
from steersman.steer.training import TrainEditConfig, memorise, sae_ssv
from steersman.steer.training.sae_ssv import select_features


@pytest.fixture(scope="module")
def planted() -> Planted:
    return concept_lm()


def cosine(v: SteeringVector, planted: Planted) -> float:
    return float(torch.cosine_similarity(v.vector, planted.direction, dim=0))


def made(planted: Planted, method: str, n: int = 24, **settings: Any) -> SteeringVector:
    positive, negative = planted.pairs(n)
    if method in ("ssv", "reft_r1"):
        return contrast(planted.lm, positive, hook=LAST, method=method, **settings)
    return contrast(planted.lm, positive, negative, hook=LAST, method=method, **settings)


SETTINGS: dict[str, dict[str, Any]] = {
    "ssv": {"epochs": 10, "lr": 0.05},
    "reft_r1": {"epochs": 10, "lr": 0.05},
    "bipo": {"epochs": 10, "lr": 0.02},
    "latent": {"steps": 60},
}


@pytest.fixture(scope="module")
def vectors(planted: Planted) -> dict[str, SteeringVector]:
    return {method: made(planted, method, **settings) for method, settings in SETTINGS.items()}


@pytest.mark.parametrize("method", list(SETTINGS))
def test_the_planted_direction_is_found(planted: Planted, vectors: dict[str, SteeringVector], method: str) -> None:
    v = vectors[method]
    assert cosine(v, planted) > (0.7 if method == "latent" else 0.9)  # a mean of what single sentences need
    assert v.method == method
    assert v.metadata["source"] == METHODS[method].source
    assert v.metadata["loss"] < v.metadata["loss_unsteered"]


@pytest.mark.parametrize("method", list(SETTINGS))
def test_it_steers_towards_the_concept(planted: Planted, vectors: dict[str, SteeringVector], method: str) -> None:
    """Concept words in new texts, more of them the larger the scale, and fewer when it is subtracted."""
    prompts = ["w50 w51", "w12 w44 w7", "w9", "w55 w20"] * 4
    v = vectors[method].calibrate(planted.lm, target_kl=0.5)

    def share(scale: float) -> float:
        with Steerer(planted.lm).vector(v, scale=scale):
            out = planted.lm.generate(prompts, max_new_tokens=6, do_sample=True, seed=1)
        return float(((out.new_tokens >= 30) & (out.new_tokens < 40)).float().mean())

    assert share(1.5) > share(0.0) + 0.1
    assert share(-1.5) <= share(0.0)


def test_reft_r1_is_of_unit_length_and_its_scale_the_largest_activation(
    planted: Planted, vectors: dict[str, SteeringVector]
) -> None:
    v = vectors["reft_r1"]
    largest = v.metadata["max_act"][LAST]
    assert v.norm() == pytest.approx(largest, rel=1e-5)
    positive, _ = planted.pairs(24)
    unit = v.vector / v.vector.norm()
    seen = []
    for prompt, answer in positive:
        ids = planted.lm.encode([prompt + answer]).input_ids
        seen.append(float((planted.lm.capture(ids, hooks=[LAST])[LAST][0, 1:] @ unit).max()))
    assert largest == pytest.approx(max(seen), rel=1e-4)


def test_detection_reads_the_direction_and_not_its_length(planted: Planted, vectors: dict[str, SteeringVector]) -> None:
    """AUROC 1 on planted tokens, about 1/2 on permuted labels; 2 v detects as v does."""
    g = torch.Generator().manual_seed(5)
    with_concept = [
        f"{planted.text(g, 4, planted.others)} {planted.text(g, 1, planted.words)} {planted.text(g, 2, planted.others)}"
        for _ in range(30)
    ]
    without = [planted.text(g, 7, planted.others) for _ in range(30)]
    v = vectors["reft_r1"]
    found = detect_concept(planted.lm, v, with_concept, without, without[:10], batch_size=7)
    assert found.auroc == 1.0
    assert found.auroc_hard == found.auroc_all == 1.0
    assert detect_concept(planted.lm, 2 * v, with_concept, without).auroc == found.auroc
    everything = [*with_concept, *without]
    values = []
    for _ in range(8):
        order = torch.randperm(60, generator=g).tolist()
        sides = [everything[i] for i in order[:30]], [everything[i] for i in order[30:]]
        values.append(detect_concept(planted.lm, v, *sides).auroc)
    assert abs(sum(values) / 8 - 0.5) < 0.12
    one: Detection = detect_concept(planted.lm, v, with_concept[:1], without[:1])
    ids = planted.lm.encode([with_concept[0]]).input_ids
    along = planted.lm.capture(ids, hooks=[LAST])[LAST][0, 1:] @ (v.vector / v.vector.norm())
    assert one.positive[0] == pytest.approx(float(along.max()), rel=1e-4)
    assert one.auroc_hard is None


def test_detection_by_a_feature_and_in_answers_alone(planted: Planted) -> None:
    sae = toy_sae(LAST)
    with torch.no_grad():
        sae.W_enc[:, 3] = 5 * planted.direction
        sae.W_dec[3] = planted.direction
    g = torch.Generator().manual_seed(6)
    with_concept, without = ([planted.text(g, 5, of) for _ in range(10)] for of in (planted.words, planted.others))
    assert detect_concept(planted.lm, (sae, 3), with_concept, without).auroc == 1.0
    prompts = [("w30 w31", " " + text) for text in without]  # the concept stands before what is read
    answers = detect_concept(planted.lm, SteeringVector.of(planted.direction, hook_name=LAST), with_concept, prompts)
    assert answers.auroc == 1.0
    with pytest.raises(SteersmanError, match="texts with the concept and texts without"):
        detect_concept(planted.lm, (sae, 3), with_concept, [])


def test_trained_style_vectors_agree_with_those_of_means(planted: Planted, vectors: dict[str, SteeringVector]) -> None:
    """`latent`, averaged by class, and the difference of the activations' means on one corpus."""
    positive, negative = planted.pairs(24)
    style = contrast(planted.lm, positive, negative, hook=LAST, method="style")
    assert vectors["latent"].cosine(style) > 0


@pytest.mark.parametrize("method", ["ssv", "reft_r1", "bipo"])
def test_several_hook_points_and_seeds(planted: Planted, method: str) -> None:
    hooks = ["blocks.0.hook_resid_post", LAST]
    positive, negative = planted.pairs(6)
    sides = (positive, negative) if method == "bipo" else (positive,)
    v = contrast(planted.lm, *sides, hook=hooks, method=method, epochs=2, lr=0.05, train_batch=2)
    assert v.hook_names == hooks
    assert all(float(d.norm()) > 0 for d in v.directions.values())
    again = contrast(planted.lm, *sides, hook=hooks, method=method, epochs=2, lr=0.05, train_batch=2)
    assert all(v.directions[h].equal(again.directions[h]) for h in hooks)


WRONG: list[tuple[Any, Any, dict[str, Any], str]] = [
    (["w5"], (), {"method": "ssv", "positions": "last"}, "reads the completions: leave out positions"),
    (["w5"], (), {"method": "latent", "positions": "last"}, "reads the completions: leave out positions"),
    (["w5"], (), {"method": "ssv", "lr": -1.0}, "lr must be a number above 0"),
    ([("w5", " w6")], (), {"method": "bipo"}, "no negative examples"),
    (["w5"], ["w6"], {"method": "bipo"}, "reads the answer to a prompt"),
    (["w5"], (), {"method": "latent", "steps": 0}, "steps must be at least 1"),
]


@pytest.mark.parametrize(("positive", "negative", "options", "message"), WRONG, ids=[w[3] for w in WRONG])
def test_wrong_input(planted: Planted, positive: Any, negative: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        contrast(planted.lm, positive, negative, hook=LAST, **options)


# Latent steering vectors


def test_a_sentence_is_memorised() -> None:
    """Ten tokens, greedily; without the vector not, and not with a random one of its norm."""
    lm = LanguageModel.load(str(MODEL_PATH), device="cpu")
    ids = lm.token_ids(texts(1, seed=11)[0], bos=True)[:11]
    sentence = lm.tokenizer.decode(ids[1:])
    assert lm.token_ids(sentence, bos=True) == ids
    (z,) = memorise(lm, [sentence], hook="blocks.1.hook_resid_post", steps=120)

    def said(v: SteeringVector, scale: float = 1.0) -> list[int]:
        with Steerer(lm).vector(v, scale=scale, include_bos=True):
            return lm.generate([""], max_new_tokens=10).new_tokens[0].tolist()

    assert said(z) == ids[1:]
    assert said(z, 0.0) != ids[1:]
    assert all(said(z.random_like(seed)) != ids[1:] for seed in range(3))
    assert z.metadata["include_bos"]
    assert z.metadata["median_norm"]["blocks.1.hook_resid_post"] > 0


# SAE-SSV


def planted_sae(planted: Planted, feature: int = 3) -> SAE:
    sae = toy_sae(LAST, k=40)
    with torch.no_grad():
        sae.W_enc -= torch.outer(planted.direction, planted.direction @ sae.W_enc)  # the others read nothing of it
        sae.W_enc[:, feature] = 2 * planted.direction
        sae.W_dec[feature] = planted.direction
        sae.b_enc += 0.3
    return sae


def sides(planted: Planted, n: int = 12) -> tuple[list[str], list[str]]:
    positive, negative = planted.pairs(n, seed=2)
    return ["".join(e) for e in positive], ["".join(e) for e in negative]


def test_the_papers_distance_adds_the_sign_of_the_difference(planted: Planted) -> None:
    """100 Adam steps of 0.05 on a loss that is linear in v: exactly 5.000 sign(mu+ - mu-), whatever its size."""
    sae = planted_sae(planted)
    v = sae_ssv(planted.lm, sae, *sides(planted), features=range(40), distance="linear", likelihood=0.0)
    start = sae_ssv(
        planted.lm, sae, *sides(planted), features=range(40), distance="linear", likelihood=0.0,
        config=TrainEditConfig(lr=1e-12, epochs=1, batch_size=64),
    )  # fmt: skip
    begun = torch.tensor(list(start.metadata["features"].values()))
    moved = torch.tensor(list(v.metadata["features"].values())) - begun
    clear = begun.abs() > 1e-3  # of the others the L1 weight exceeds the slope
    assert clear.sum() > 20
    torch.testing.assert_close(moved[clear], 5.0 * begun[clear].sign(), rtol=0, atol=2e-3)
    assert begun[clear].abs().max() > 20 * begun[clear].abs().min(), "sizes differ, the steps do not"


def test_with_the_margin_the_planted_feature_takes_the_weight(planted: Planted) -> None:
    sae = planted_sae(planted)
    config = TrainEditConfig(lr=0.05, epochs=300, batch_size=64, schedule="linear")
    v = sae_ssv(planted.lm, sae, *sides(planted), features=range(40), likelihood=0.0, l1=0.05, config=config)
    weights = {int(j): abs(c) for j, c in v.metadata["features"].items()}
    assert max(weights, key=weights.__getitem__) == 3
    assert weights[3] > 0.5 * sum(weights.values())
    assert cosine(v, planted) > 0.8
    torch.testing.assert_close(
        v.vector, sum(c * sae.W_dec[int(j)].detach() for j, c in v.metadata["features"].items()), rtol=1e-4, atol=1e-5
    )


def test_few_features_are_chosen_and_the_planted_one_first(planted: Planted) -> None:
    g = torch.Generator().manual_seed(4)
    plus, minus = torch.rand(20, 30, generator=g), torch.rand(20, 30, generator=g)
    plus[:, 7] += 2.0
    plus[:, 9] += 0.1
    chosen = select_features(plus, minus, candidates=10, probes=10)
    assert chosen[0] == 7
    assert len(chosen) <= 2
    assert chosen == select_features(plus, minus, candidates=10, probes=10)
    v = sae_ssv(planted.lm, planted_sae(planted), *sides(planted), probes=5, config=TrainEditConfig(lr=0.05, epochs=20))
    assert "3" in v.metadata["features"]
    assert v.metadata["loss"] < v.metadata["loss_unsteered"]
    with pytest.raises(SteersmanError, match="4 texts a side"):
        select_features(plus[:3], minus)
    with pytest.raises(SteersmanError, match="as many negatives as positives"):
        sae_ssv(planted.lm, planted_sae(planted), ["w5"] * 5, ["w6"] * 4)


def test_widths(planted: Planted) -> None:
    assert planted.lm.d_model == D
