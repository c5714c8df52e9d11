"""One rule for whether an SAE, a vector, a map or a store fits: every place that asks gives the same answer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.stores import random_rows, store_of
from support.tiny_models import D, with_text

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import Origin, check_fits, check_sae_fits, check_same_origin, same_model
from steersman.sae import SAE, SAEConfig
from steersman.steer import Steerer, SteeringVector, decompose, measure_retention
from steersman.steer.effects.folder import Effects
from steersman.steer.effects.map import EffectMap
from steersman.steer.effects.vectors import given_vectors
from steersman.train.reports.evaluate import evaluate_sae
from steersman.train.reports.spliced import spliced_loss

HOOK, NAME = "blocks.1.hook_resid_post", "google/gemma-2-2b"


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("google/gemma-2-2b", "gemma-2-2b", True),
        ("models/Gemma-2-2b/", "google/gemma-2-2b", True),
        ("gpt2-small", "openai-community/gpt2", True),
        ("", "gpt2", True),
        ("gpt2", "gpt2-medium", False),
        ("google/gemma-2-2b", "google/gemma-2-9b", False),
    ],
)
def test_same_model(a: str, b: str, same: bool) -> None:
    assert same_model(a, b) is same_model(b, a) is same


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    lm = with_text("llama")
    lm.name = NAME
    return lm


def sae_of(made: Origin) -> SAE:
    cfg = SAEConfig(d_in=made.width or D, d_sae=40, k=4, hook_name=made.hook_name, model_name=made.model_name)
    return SAE(cfg, torch.Generator().manual_seed(0))


def vector_of(made: Origin) -> SteeringVector:
    return SteeringVector.of(torch.ones(made.width or D), hook_name=made.hook_name, model_name=made.model_name)


def effect_map() -> EffectMap:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, D, generator=g)
    return Effects.from_tensors(x, x @ torch.randn(D, 40, generator=g), sae=sae_of(Origin(NAME, HOOK, D))).fit(
        ridge=0.0
    )


def store_reader(made: Origin, folder: Path) -> None:
    store = store_of(random_rows(50, D), folder / "acts", model_name=NAME)
    store.hook_of(sae_of(made))
    evaluate_sae(sae_of(made), store, split="all")


Use = Callable[[LanguageModel, Origin, Path], object]
USES: dict[str, Use] = {
    "check_sae_fits": lambda lm, made, _: check_sae_fits(lm, sae_of(made), HOOK),
    "Steerer.features": lambda lm, made, _: Steerer(lm).features(sae_of(made), {1: 1.0}, hook=HOOK),
    "Steerer.vector": lambda lm, made, _: Steerer(lm).vector(vector_of(made), hook=HOOK),
    "vectors to measure": lambda lm, made, _: given_vectors([vector_of(made)], lm, HOOK),
    "EffectMap.predict": lambda lm, made, _: effect_map().predict(vector_of(made)),
    "decompose": lambda lm, made, _: decompose(vector_of(made), sae_of(Origin(NAME, HOOK, D)), k=2),
    "decompose with a model": lambda lm, made, _: decompose(vector_of(made), sae_of(Origin(NAME, HOOK, D)), k=2, lm=lm),
    "measure_retention": lambda lm, made, _: measure_retention(
        decompose(torch.ones(made.width or D), sae_of(made), k=2), lm, ["w5 w6 w7"], hook=HOOK
    ),
    "spliced_loss": lambda lm, made, _: spliced_loss(sae_of(made), lm, ["w5 w6 w7"], torch.zeros(D), hook=HOOK),
    "a store": lambda lm, made, folder: store_reader(made, folder),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "made",
    [
        Origin(NAME, HOOK),
        Origin("gemma-2-2b", HOOK),
        Origin("models/Gemma-2-2b/", HOOK),
        Origin("", HOOK),
        Origin(NAME, "model.layers.1"),
    ],
    ids=str,
)
def test_what_fits_fits_everywhere(lm: LanguageModel, use: str, made: Origin, tmp_path: Path) -> None:
    USES[use](lm, made, tmp_path)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("made", "named"),
    [
        (Origin("google/gemma-2-9b", HOOK), ("made for 'google/gemma-2-9b'", repr(NAME))),
        (Origin("gpt2", HOOK), ("made for 'gpt2'", repr(NAME))),
        (Origin(NAME, "blocks.2.hook_resid_post"), ("blocks.2.hook_resid_post", HOOK)),
        (Origin(NAME, HOOK, D + 2), (str(D + 2), str(D))),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_everywhere(
    lm: LanguageModel, use: str, made: Origin, named: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(SteersmanError) as error:
        USES[use](lm, made, tmp_path)
    for side in named:
        assert side in str(error.value)


def test_where_it_is_asked_for(lm: LanguageModel) -> None:
    made = {"what": "this thing", "model_name": "", "width": None}
    assert check_fits(lm, hook_name="layers.1", hook=HOOK, **made) == HOOK
    assert check_fits(lm, hook_name="", hook="model.layers.1", **made) == HOOK
    with pytest.raises(
        SteersmanError, match="this thing records no hook point: name the one it was made at with hook="
    ):
        check_fits(lm, hook_name="", **made)
    with pytest.raises(
        SteersmanError, match=r"this thing was made at 'layers\.2', not at 'blocks\.1\.hook_resid_post'"
    ):
        check_fits(lm, hook_name="layers.2", hook=HOOK, **made)
    with pytest.raises(SteersmanError, match="there is no layer 7, the model has 3 layers"):
        check_fits(lm, hook_name="layers.7", **made)


def test_two_without_a_model() -> None:
    a = Origin("google/gemma-2-2b", "model.layers.6", 4)
    check_same_origin("the SAE", a, "the store", Origin("gemma-2-2b", "blocks.6.hook_resid_post", 4))
    check_same_origin("the SAE", a, "the store", Origin())
    with pytest.raises(SteersmanError, match="the SAE was made for 'google/gemma-2-2b', the store for 'gpt2': use two"):
        check_same_origin("the SAE", a, "the store", Origin("gpt2", a.hook_name, 4))
    with pytest.raises(
        SteersmanError, match=r"the SAE was made at 'model.layers.6', the store at 'blocks.6.hook_mlp_out'"
    ):
        check_same_origin("the SAE", a, "the store", Origin("", "blocks.6.hook_mlp_out", 4))
    with pytest.raises(SteersmanError, match="the SAE has width 4, the store has width 5"):
        check_same_origin("the SAE", a, "the store", Origin("", "", 5))
