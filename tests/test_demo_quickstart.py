"""The quickstart end to end, small; and the measures it reports."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from steersman.demo import quickstart as demo
from steersman.demo.quickstart import QuickstartConfig, quickstart
from steersman.errors import SteersmanError
from steersman.sae import SAE


def test_quickstart_makes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STRENGTHS", (0.0, 1.0))
    config = QuickstartConfig(
        out=str(tmp_path / "out"), tokens=40_000, d_sae=256, targets=1, samples=4, max_new_tokens=12, effect_texts=0
    )
    results = quickstart(config)
    assert results.evaluation.loss is not None
    assert results.evaluation.loss.ce_clean < 1.0, "the bundled model does not know the bundled stories"
    clear = sum(match.auroc >= 0.95 for match in results.concepts)
    assert clear > 0.4 * len(results.concepts)
    (steered,) = results.steered
    assert steered.doses[0].strength == 0
    report = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64" in report
    assert "src='http" not in report
    assert str(results.concepts[0].concept) in report
    clearest = next(match for match in results.concepts if match.auroc >= 0.95)
    page = tmp_path / "out" / "site" / "features" / f"{clearest.feature}.html"
    assert f'href="site/features/{clearest.feature}.html"' in report
    assert re.search("<h1>Feature [0-9]+ <bdi>", page.read_text()), "it is not called by its concept"
    labels = SAE.load(tmp_path / "out" / "sae").labels
    assert labels.text(clearest.feature) == clearest.concept
    assert {one.id for one in results.features if one.contexts} <= set(labels), "every feature that fires has a label"
    assert steered.label == labels.text(steered.feature) != ""
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(figures["steered"]) == 1
    contrast = results.contrast
    assert contrast is not None
    parts = contrast.found.as_features()
    assert parts[contrast.features[0]] > 0 > parts.get(contrast.features[1], -1.0)
    assert contrast.kept["reconstruction, equal norm"].retained > 0.7
    assert f"A vector taken apart: {contrast.concept} less {contrast.against}" in report
    assert figures["contrast"]["decomposition"]["method"] == "omp"


def test_sae_ts_and_direction_push_equally_hard() -> None:
    from steersman import SAE, LanguageModel, SAEConfig
    from steersman.demo import CONCEPTS, MODEL_PATH, texts
    from steersman.demo.report import _targeting
    from steersman.demo.targets import Target
    from steersman.demo.vectors import BUDGET, target_feature

    lm = LanguageModel.load(str(MODEL_PATH))
    config = SAEConfig(d_in=128, d_sae=160, k=32, hook_name="blocks.2.hook_resid_post", model_name=lm.name)
    sae = SAE(config, torch.Generator().manual_seed(0))
    targets = [Target(name=f"t{i}", words=CONCEPTS["rain"].words, candidates=(i,)) for i in range(40)]
    options = {"n_texts": 140, "max_new_tokens": 6, "seed": 0}
    found = target_feature(lm, sae, targets, {"t0": 7}, texts(4, seed=3), ["Once upon a time"] * 3, **options)
    assert found is not None, "no feature of a random dictionary has a signal"
    unsteered, plain, optimised = found.ways[0], found.ways[1], found.ways[-1]
    assert unsteered.norm == 0
    assert plain.kl == pytest.approx(BUDGET, rel=0.06)
    assert optimised.kl == pytest.approx(BUDGET, rel=0.06)
    assert len(plain.texts) == 3
    assert "SAE-TS" in found.to_text()
    shown = _targeting(SimpleNamespace(targeted=found))  # pyright: ignore[reportArgumentType]
    assert shown is not None
    assert f"feature {found.feature}, which fires" in shown["intro"]
    assert len(shown["pairs"]) == 3


def test_quickstart_runs_on_another_text(tmp_path: Path) -> None:
    from steersman.demo import MODEL_PATH, texts

    file = tmp_path / "text.txt"
    file.write_text("\n".join(texts(300, seed=21)))
    config = QuickstartConfig(
        out=str(tmp_path / "out"), model=str(MODEL_PATH), text=str(file), hook="model.layers.1",
        tokens=15_000, d_sae=128, targets=1, samples=4, max_new_tokens=8,
    )  # fmt: skip
    results = quickstart(config)
    assert results.hook_name == "blocks.1.hook_resid_post"
    assert not results.concepts
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_model_needs_its_text(tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="--model needs --text"):
        quickstart(QuickstartConfig(out=str(tmp_path), model="somewhere"))
