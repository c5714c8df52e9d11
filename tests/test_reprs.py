"""What objects say of themselves at a prompt: one short line with what they are, no address and no tensor."""

import re
from pathlib import Path
from typing import Any

import torch
from support.training import HOOK, mixture

from steersman import ActivationStore, LanguageModel, Steerer, SteeringVector, decompose
from steersman.sae import SAE, FeatureLabel, FeatureLabels, FeatureStats, SAEConfig
from steersman.steer import Comparison
from steersman.steer.compare import TextPair
from steersman.steer.steering import Steering
from steersman.train import FeatureReport, HookView, StreamConfig, stream_activations


def cell(thing: Any) -> str:
    """What a notebook shows of it: whole HTML, styles of its own, nothing that runs, no address."""
    html = thing._repr_html_()
    assert html.startswith("<style>")
    assert html.count("<div") == html.count("</div>")
    assert "<script" not in html
    assert not re.search(r"0x[0-9a-f]{6}|tensor\(", html)
    return html


def one_line(thing: object) -> str:
    text = repr(thing)
    assert len(text) < 250
    assert "\n" not in text
    assert not re.search(r"0x[0-9a-f]{6}|tensor\(", text)
    return text


def test_saes_and_stores(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(d_in=8, d_sae=64, k=5, hook_name="blocks.2.hook_resid_post", model_name="gpt2"))
    assert one_line(sae) == "TopKSAE(d_in=8, d_sae=64, k=5, blocks.2.hook_resid_post of gpt2)"
    transcoder = SAEConfig(
        d_in=8, d_sae=64, architecture="relu", transcoder=True, apply_b_dec_to_input=False, hook_name="a", d_out=4
    )
    assert one_line(SAE(transcoder)) == "ReLUSAE(d_in=8, d_sae=64, a -> 4 of an unknown model)"
    rows = mixture(2000)
    store = ActivationStore.from_tensors([rows], tmp_path / "acts", HOOK, model_name="gpt2", dtype="float32")
    width = rows.shape[1]
    assert one_line(store) == f"ActivationStore('{store.path}', 2,000 rows, {HOOK} [{width}] of gpt2)"
    assert one_line(HookView(store, HOOK)) == f"HookView({HOOK} of {store})"


def test_steering_and_what_it_finds(lm: LanguageModel) -> None:
    d = lm.hook_width("blocks.1.hook_resid_post")
    sae = SAE(SAEConfig(d_in=d, d_sae=2 * d, k=4, hook_name="blocks.1.hook_resid_post", model_name=lm.name))
    steerer = Steerer(lm)
    assert one_line(steerer) == f"Steerer({lm})"
    steering: Steering = steerer.features(sae, {3: 1.0})
    assert one_line(steering) == "Steering(FeatureEdit at blocks.1.hook_resid_post)"
    found = decompose(torch.randn(d, generator=torch.Generator().manual_seed(0)), sae, method="omp", k=5)
    assert re.match(r"Decomposition\(omp, 5 features \{\d+: [+-].*, \.\.\.\}, explained variance ", one_line(found))
    stream = stream_activations(lm, ["some text"], StreamConfig(hook="blocks.1.hook_resid_post"))
    assert one_line(stream).startswith(f"ActivationStream(blocks.1.hook_resid_post [{d}] of {lm.name} over ")


def test_notebook_cells(lm: LanguageModel, tmp_path: Path) -> None:
    d, hook = lm.hook_width("blocks.1.hook_resid_post"), "blocks.1.hook_resid_post"
    assert "<dt>layers</dt>" in cell(lm)
    rows = mixture(2000)
    store = ActivationStore.from_tensors([rows], tmp_path / "<b>acts", HOOK, model_name="gpt2", dtype="float32")
    html = cell(store)
    assert "&lt;b&gt;acts" in html
    assert "2,000" in html
    sae = SAE(SAEConfig(d_in=d, d_sae=2 * d, k=4, hook_name=hook, model_name=lm.name))
    sae.labels = FeatureLabels({1: FeatureLabel(text="x")})
    assert "<dt>labels</dt>" in cell(sae)
    assert "<img" not in cell(sae)
    ones = torch.ones(2 * d)
    sae.feature_stats = FeatureStats(max_act=ones, density=ones, mean_act=ones, n_tokens=9, median_norm=1.0)
    assert "<img alt='how many features fire" in cell(sae)
    vector = SteeringVector(
        directions={hook: torch.ones(d)}, model_name=lm.name, method="<i>", metadata={"units": {"a": 1}}
    )
    assert "&lt;i&gt;" in cell(vector)
    found = decompose(torch.randn(d, generator=torch.Generator().manual_seed(0)), sae, method="omp", k=5)
    html = cell(found)
    assert html.count("<tr>") == 6
    assert "<img" in html
    pair = TextPair(prompt="<u>", unsteered="a", steered="b", kl_mean=None, kl_p95=None, unsteered_nll=None,
                    nll=None, repetition=0.0, distinct_2=0.0)  # fmt: skip
    assert "&lt;u&gt;" in cell(Comparison(pairs=[pair], edit=None, n_steered=7, kl_mean=0.25, kl_p95=1.0))


def test_reports() -> None:
    stats = FeatureStats(
        max_act=torch.ones(64), density=torch.ones(64), mean_act=torch.ones(64), n_tokens=1234, median_norm=1.0
    )
    assert one_line(stats) == "FeatureStats(64 features over 1,234 tokens)"
    cell(FeatureReport(features=[], stats=stats))
    assert one_line(FeatureReport(features=[], stats=stats)) == "FeatureReport(0 features of 64, 1,234 tokens)"
    comparison = Comparison(pairs=[], edit=None, n_steered=7, kl_mean=0.25, kl_p95=1.0)
    assert one_line(comparison) == "Comparison(0 prompts, 7 tokens steered, KL per token 0.25)"
