"""Features of a transcoder are edited where it writes, by the code of what it reads in the same pass."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.helpers import make_sae
from support.runtime_contract import check_contract, check_off
from support.tiny_models import D
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.sae.base import FeatureStats
from steersman.steer import Steerer, Steering
from steersman.steer.edits import FeatureEdit

READ, WRITE = "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"
IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 10, 11, 12, 13, 14]])


@pytest.fixture(scope="module")
def sae() -> SAE:
    return make_sae(
        "topk", d_in=D, d_sae=40, k=6, transcoder=True, skip_connection=True, hook_name=READ, hook_name_out=WRITE
    )


def written(lm: LanguageModel, steering: Steering) -> Tensor:
    with steering:
        return lm.capture(IDS, hooks=[WRITE])[WRITE]


def test_each_mode_is_its_formula_with_the_error_kept(lm: LanguageModel, sae: SAE) -> None:
    found = lm.capture(IDS, hooks=[READ, WRITE])
    code, y = sae.encode(found[READ]), found[WRITE]
    j = int((code > 0).float().mean((0, 1)).argmax())
    f, d = code[..., j, None], sae.W_dec[j].detach()
    along = (y @ d)[..., None] * d / d.norm() ** 2
    coefficients = {"add": 2.0, "clamp": 2.0 - f, "floor": (2.0 - f).relu(), "scale": f, "cap": -(f - 2.0).relu()}
    expected = {mode: y + c * d for mode, c in coefficients.items()} | {"project_out": y - 2 * along}
    for mode, wanted in expected.items():
        got = written(lm, Steerer(lm).features(sae, {j: 2.0}, mode=mode))
        torch.testing.assert_close(got[:, 1:], wanted[:, 1:], rtol=1e-5, atol=1e-5)
        assert torch.equal(got[:, 0], y[:, 0])  # the BOS, bit for bit
    # Decoding the code with the feature ablated changes the prediction by as much as the edit changes the output.
    ablated = written(lm, Steerer(lm).features(sae, {j: 0.0}, mode="scale"))
    change = sae.decode(code.index_fill(2, torch.tensor([j]), 0.0)) - sae.decode(code)
    torch.testing.assert_close((ablated - y)[:, 1:], change[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["scale", "clamp"])
def test_the_runtime_contract(lm: LanguageModel, sae: SAE, mode: str) -> None:
    strengths = [{3: 40.0, 5: -60.0, 9: 60.0}, {3: -50.0, 8: 40.0}, {5: 60.0, 11: -60.0}]

    def opened(rows: Sequence[int]) -> Steering:
        return Steerer(lm).features(sae, [strengths[row] for row in rows], mode=mode)

    check_contract(lm, opened)
    check_off(lm, Steerer(lm).features(sae, {3: 5.0}, mode=mode, gate=0.0))
    check_off(lm, Steerer(lm).features(sae, {3: 1.0}, mode="scale"))


def test_scopes_gates_and_an_edit_kept_in_a_file_read_the_same(lm: LanguageModel, sae: SAE) -> None:
    y = lm.capture(IDS, hooks=[WRITE])[WRITE]
    edit = FeatureEdit(sae, {3: 4.0}, mode="clamp")
    whole = written(lm, Steerer(lm).edit(WRITE, edit))
    window = Steerer(lm).edit(WRITE, FeatureEdit.restored(edit.saved()), scope="2:4", gate=[0.0, 1.0])
    got = written(lm, window)
    assert window.trace.rows == [0, 2]
    expected = y.clone()
    expected[1, 2:4] = whole[1, 2:4]
    torch.testing.assert_close(got, expected)
    # What stands where it reads may be edited too: its code is then of that.
    with Steerer(lm).vector(torch.ones(D), hook=READ):
        read = lm.capture(IDS, hooks=[READ, WRITE])
        both = written(lm, Steerer(lm).edit(WRITE, edit))
    f = sae.encode(read[READ])[..., 3, None]
    torch.testing.assert_close(both[:, 1:], (read[WRITE] + (4.0 - f) * sae.W_dec[3].detach())[:, 1:])


def test_a_part_of_the_median_norm_is_of_what_it_writes(lm: LanguageModel, sae: SAE) -> None:
    zeros = torch.zeros(40)
    sae.feature_stats = FeatureStats(max_act=zeros, density=zeros, mean_act=zeros, n_tokens=10, median_norm=3.0)
    got = written(lm, Steerer(lm).features(sae, {7: 0.5}, units="norm_frac"))
    y = lm.capture(IDS, hooks=[WRITE])[WRITE]
    torch.testing.assert_close((got - y)[:, 1:].norm(dim=-1), torch.full((2, 5), 1.5))


def _with(sae: SAE, **changes: Any) -> SAE:
    return SAE(replace(sae.cfg, **changes))


def test_what_cannot_be_edited_says_so(lm: LanguageModel, sae: SAE) -> None:
    steerer = Steerer(lm)
    for changes, message in [
        (
            {"hook_name": "blocks.2.hook_mlp_in"},
            "reads blocks.2.hook_mlp_in and writes .*, which the pass does not come",
        ),
        (
            {"hook_name_out": "blocks.1.mlp.hook_post"},
            "what this transcoder writes has width 16, blocks.1.mlp.hook_post",
        ),
        ({"hook_name_out": ""}, "what this transcoder writes records no hook point: name the one"),
        ({"model_name": "gpt2"}, "this transcoder was made for 'gpt2', the model is 'llama'"),
    ]:
        with pytest.raises(SteersmanError, match=message):
            steerer.features(_with(sae, **changes), {0: 1.0})
    with pytest.raises(SteersmanError, match="what this transcoder writes was made at .*, not at"):
        steerer.edit("blocks.1.hook_resid_post", FeatureEdit(sae, {0: 1.0}, mode="clamp"))
    with pytest.raises(SteersmanError, match="measure=True encodes the edited states, which needs an SAE that writes"):
        steerer.features(sae, {0: 1.0}, measure=True)
    edit = FeatureEdit(sae, {0: 1.0}, mode="clamp")
    with lm.edit(WRITE, lambda h, fwd: edit.apply(h, fwd, True)), pytest.raises(SteersmanError, match="open it with a"):
        lm.logits(IDS)
