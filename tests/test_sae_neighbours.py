"""Features near one another and near a direction."""

import pytest
import torch

from steersman.errors import SteersmanError
from steersman.sae import SAE, Neighbour, SAEConfig, feature_neighbours, nearest_features, neighbours


@pytest.fixture
def sae() -> SAE:
    """Four features: 1 writes nearly what 0 does and reads what 2 does; 3 writes the opposite of 0."""
    made = SAE(SAEConfig(d_in=3, d_sae=4, k=2))
    with torch.no_grad():
        made.W_dec[:] = torch.tensor([[1.0, 0, 0], [2.0, 0.2, 0], [0, 0, 1.0], [-3.0, 0, 0]])
        made.W_enc[:] = torch.tensor([[0.0, 1, 0], [1.0, 0, 0], [5.0, 0, 0.5], [0, 0, 1.0]]).T
    return made


def test_planted_neighbours(sae: SAE) -> None:
    assert feature_neighbours(sae, [0], n=1).of(0)[0].feature == 1
    assert feature_neighbours(sae, [0], n=1).of(0)[0].cosine == pytest.approx(2 / 4.04**0.5)
    assert feature_neighbours(sae, [1], n=1, by="encoder").features.tolist() == [[2]]
    assert feature_neighbours(sae, [0], n=1, sign="negative").of(0)[0] == Neighbour(feature=3, cosine=-1.0)
    assert feature_neighbours(sae, [0], n=1, sign="both").features.tolist() == [[3]]


def test_blocks_change_nothing_and_no_feature_is_its_own_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SAE(SAEConfig(d_in=6, d_sae=30, k=2), torch.Generator().manual_seed(0))
    whole = feature_neighbours(made, n=99)
    monkeypatch.setattr(neighbours, "_ENTRIES", 70)
    parts = feature_neighbours(made, n=99)
    assert torch.equal(whole.features, parts.features)
    torch.testing.assert_close(whole.cosines, parts.cosines)
    assert whole.features.shape == (30, 29)
    assert not (whole.features == torch.arange(30)[:, None]).any()
    assert (whole.cosines[:, 1:] <= whole.cosines[:, :-1] + 1e-6).all()


def test_direction(sae: SAE) -> None:
    found = nearest_features(sae, torch.tensor([0.0, 0.0, 7.0]), n=2)
    assert found.of(0)[0] == Neighbour(feature=2, cosine=1.0)
    assert nearest_features(sae, torch.eye(3), n=1, by="encoder").features.tolist() == [[1], [0], [3]]


@pytest.mark.parametrize(
    "direction", [torch.zeros(3), torch.tensor([1.0, float("nan"), 0.0]), torch.ones(4), torch.ones(1, 2, 3)]
)
def test_refused(sae: SAE, direction: torch.Tensor) -> None:
    with pytest.raises(SteersmanError):
        nearest_features(sae, direction)


def test_wrong_questions(sae: SAE) -> None:
    with pytest.raises(SteersmanError, match="out of range"):
        feature_neighbours(sae, [4])
    with pytest.raises(SteersmanError, match="decoder or encoder"):
        feature_neighbours(sae, [0], by="logits")  # pyright: ignore[reportArgumentType]
