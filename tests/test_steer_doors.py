"""Methods from outside the package, found by their names; and settings by the names they had."""

import secrets
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.helpers import make_sae
from support.tiny_models import with_text
from torch import Tensor

from steersman import LanguageModel, SteeringVector, SteersmanError
from steersman.steer import ContrastConfig, DecomposeConfig, Retention, SteerConfig, contrast, decompose
from steersman.steer.decompose import METHODS, Method, Problem, Sources, Terms
from steersman.steer.decompose.base import Null
from steersman.steer.decompose.terms import largest
from steersman.steer.methods import METHODS as VECTOR_METHODS
from steersman.steer.methods import Examples
from steersman.steer.methods import Method as VectorMethod
from steersman.steer.methods.base import Made

HOOK = "blocks.1.hook_resid_post"


class Projection(Method):
    """The inner products with the decoder's directions, as they are."""

    name = "projection"
    source = "a test"
    reads = ("texts",)
    settings = ("steps",)
    null = Null.EQUAL_NORM
    units = "inner products"

    def read(self, sources: Sources) -> int:
        return len(sources.texts or ())

    def terms(self, problem: Problem) -> list[Terms]:
        assert problem.data == 2
        terms = []
        for v in problem.vectors:
            values = problem.atoms.correlate(v[None], exact=True)[0]
            ids = largest(values, problem.config.k)
            terms.append(Terms(features=ids, coefficients=values[ids]))
        return terms


def test_a_method_of_decomposition_is_one_class() -> None:
    sae = make_sae(d_in=20, d_sae=64)
    v = torch.randn(20, generator=torch.Generator().manual_seed(secrets.randbelow(2**31)))
    found = decompose(v, sae, method="projection", k=3, texts=["a", "b"], steps=2)
    W = sae.W_dec.detach().double()
    products = W @ v.double() / W.norm(dim=1)
    assert found.features.tolist() == products.abs().topk(3).indices.tolist()
    torch.testing.assert_close(found.coefficients, products[found.features])
    assert found.units == "inner products"
    assert len(found.null_curve) == 3
    with pytest.raises(SteersmanError, match="'projection' needs texts="):
        decompose(v, sae, method="projection")
    with pytest.raises(SteersmanError, match="steps is a setting of .*projection.*, not of omp"):
        decompose(v, sae, steps=2)
    with pytest.raises(SteersmanError, match="unknown method 'projektion'.*nearest is 'projection'"):
        decompose(v, sae, method="projektion")
    with pytest.raises(SteersmanError, match="method 'projection' is already that of"):
        type("Other", (Projection,), {"name": "projection"})
    assert METHODS["projection"] is Projection


class Constant(VectorMethod):
    """The same direction, whatever the examples."""

    name = "constant"
    source = "a test"
    positions = "none"
    needs_negative = False

    def make(
        self,
        lm: LanguageModel,
        examples: Examples,
        hooks: list[str],
        config: ContrastConfig,
        means: Mapping[str, Tensor] | None,
    ) -> Made:
        return Made(directions={hook: torch.ones(lm.hook_width(hook)) for hook in hooks})


def test_a_vector_method_is_one_class() -> None:
    v = SteeringVector.contrast(with_text("llama"), ["w5"], hook=HOOK, method="constant")
    assert v.method == "constant"
    assert v.metadata["source"] == "a test"
    assert bool((v.vector == 1).all())
    assert VECTOR_METHODS["constant"] is Constant


def test_settings_by_their_old_names() -> None:
    with pytest.warns(DeprecationWarning, match="read=.* is positions now"):
        assert DecomposeConfig(method="contrast", read="last").positions == "last"  # pyright: ignore[reportCallIssue]
    with pytest.warns(DeprecationWarning, match="tokens=.* is positions now"):
        assert ContrastConfig(tokens="last").positions == "last"  # pyright: ignore[reportCallIssue]
    gone: dict[str, Any] = {"model": "m", "sae": "s", "device": "cpu"}
    with pytest.warns(DeprecationWarning, match="is read by nothing"):
        assert SteerConfig(feature=("3=1",), **gone) == SteerConfig(feature=("3=1",))
    with pytest.warns(DeprecationWarning, match="kept is variants now"):
        assert Retention(variants=[], scale=1.0, n_tokens=0).kept == []  # pyright: ignore[reportAttributeAccessIssue]


def test_files_keep_the_names_that_they_have() -> None:
    """What older versions wrote is read by them, and by scripts, under these keys."""
    lm = with_text("llama")
    with pytest.warns(DeprecationWarning, match="positions"):
        v = contrast(lm, ["w5 w6", "w7 w8"], ["w20 w21", "w22 w23"], hook=HOOK, tokens="last")
    assert v.metadata["settings"]["tokens"] == v.metadata["tokens"] == "last"
    assert "positions" not in v.metadata["settings"]
    sae = make_sae(d_in=16, d_sae=64)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    found = decompose(None, sae, method="contrast", positive=x[0] + 1, negative=x[1], positions="last")
    assert found.to_dict()["settings"]["read"] == "last"
