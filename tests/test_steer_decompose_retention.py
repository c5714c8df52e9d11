"""Retention, pictures and the command, on the bundled model: a contrast of two concepts falls into the features that
the grammar's labels name, and 16 features keep its effect."""

import functools
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import fails
from support.tiny_models import toy_sae, with_text

from steersman import LanguageModel, SteersmanError, TrainConfig, cache_activations, decompose, train_sae
from steersman.cli import main
from steersman.demo import CONCEPTS, MODEL_PATH, stories, texts
from steersman.demo.concept_features import auroc, encode_stories
from steersman.figures import save_figure
from steersman.steer import SteeringVector, calibrate, measure_retention, plot_decompositions

HOOK = "blocks.2.hook_resid_post"
PAIRS = [("rain", "snow"), ("fruit", "vegetables")]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundled model, a small SAE of it, and for each concept the feature that tells it from its group."""
    folder = tmp_path_factory.mktemp("concepts")
    lm = LanguageModel.load(str(MODEL_PATH))
    store = cache_activations(lm, texts(1700, seed=0), hook=HOOK, out=str(folder / "acts"), tokens=100_000)
    sae = train_sae(store, TrainConfig(d_sae=256, k=16), folder / "sae")
    codes, labels = encode_stories(lm, sae, list(islice(stories(3), 200)))
    names = list(CONCEPTS)
    features = {}
    for pair in PAIRS:
        members = [i for i, name in enumerate(names) if CONCEPTS[name].group == CONCEPTS[pair[0]].group]
        inside = labels[:, members].any(dim=1)
        scores = auroc(codes[inside], labels[inside][:, [names.index(name) for name in pair]])
        features |= dict(zip(pair, scores.argmax(dim=0).tolist()))
    return lm, sae, features, folder


@functools.cache  # some two thousand stories are written to find them
def ending(concept: str, seed: int) -> list[str]:
    """The beginnings of 40 stories up to a mention of a concept."""
    found = (story.text[:end] for story in stories(seed) for _, end, name in story.spans[:6] if name == concept)
    return list(islice(found, 40))


def contrast_of(lm: LanguageModel, a: str, b: str) -> SteeringVector:
    return SteeringVector.contrast(lm, ending(a, 7), ending(b, 8), hook=HOOK, method="diffmean", tokens="last")


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_a_contrast_of_concepts_falls_into_their_features(bundled: Any, a: str, b: str) -> None:
    lm, sae, features, _ = bundled
    v, unseen = contrast_of(lm, a, b), texts(16, seed=11)
    scale = calibrate(v, lm, texts=unseen, target_kl=0.3).search.scale
    found = decompose(v, sae, method="omp", k=16, labels={f: name for name, f in features.items()})
    parts = dict(zip(found.labels, found.coefficients.tolist()))
    assert parts[a] > 0 > parts[b]
    assert found.explained_variance > float(found.null_high[-1])
    kept = measure_retention(found, lm, unseen, scale=scale, toward=CONCEPTS[a].words, away=CONCEPTS[b].words)
    equal = kept["reconstruction, equal norm"]
    assert equal.retained > 0.8
    assert equal.rise_retained is not None
    # An SAE of few tokens; scripts/examples/decompose_concepts.py measures a full one.
    assert equal.rise_retained > 0.5
    assert equal.agreement > 0.9
    whole, random = kept["vector"], kept["random, equal norm"]
    assert (whole.retained, whole.agreement) == (pytest.approx(1), pytest.approx(1))
    assert whole.norm == pytest.approx(equal.norm)
    assert kept["reconstruction, equal KL"].kl == pytest.approx(whole.kl, rel=0.03)
    assert random.retained < 0.6 < equal.retained
    assert kept["residual"].norm == pytest.approx(scale * float(found.residual.norm()))
    assert "reconstruction, equal KL" in kept.to_text()


def test_retention_by_hand() -> None:
    lm, sae = with_text("llama"), toy_sae()
    found = decompose(3 * sae.W_dec[3].detach() + sae.W_dec[9].detach(), sae, k=1)
    words = ["w5 w6 w7", "w8 w9 w10 w11"]
    kept = measure_retention(found, lm, words, scale=2.0)
    change, whole = [], []
    for text in words:
        batch = lm.encode([text])
        base = lm.logits(batch.input_ids).softmax(-1)[0]
        for vector, out in ((found.vector, whole), (found.reconstruction, change)):
            push = vector * (2 * found.vector.norm() / vector.norm())

            def edit(h: torch.Tensor, _: Any, push: torch.Tensor = push) -> torch.Tensor:
                return torch.cat([h[:, :1], h[:, 1:] + push], dim=1)  # all but the BOS

            with lm.edit(sae.cfg.hook_name, edit):
                out.append(lm.logits(batch.input_ids).softmax(-1)[0] - base)
    a, b = torch.cat(change).flatten(), torch.cat(whole).flatten()
    equal = kept["reconstruction, equal norm"]
    assert equal.retained == pytest.approx(float(a @ b / (b @ b)), rel=1e-4)
    assert equal.agreement == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-4)
    assert equal.rise is None
    assert kept.n_tokens == 9


def test_retention_mistakes() -> None:
    lm = with_text("llama")
    found = decompose(torch.ones(16), toy_sae(model_name="other"), k=1)
    with pytest.raises(SteersmanError, match="made for 'other', the model is 'llama'"):
        measure_retention(found, lm, ["w5 w6"])
    found = decompose(torch.ones(16), toy_sae(hook=""), k=1)
    with pytest.raises(SteersmanError, match="records no hook point: name the one it was made at with hook="):
        measure_retention(found, lm, ["w5 w6"])
    with pytest.raises(SteersmanError, match="no texts"):
        measure_retention(found, lm, [], hook="blocks.1.hook_resid_post")


def test_the_picture(tmp_path: Path) -> None:
    sae = toy_sae()
    found = [decompose(torch.ones(16), sae, method=method, k=8) for method in ("omp", "lasso", "encode")]
    (axes,) = plot_decompositions(found).axes
    assert [line.get_label() for line in axes.get_lines()][::2][:3] == ["0: omp", "1: lasso", "2: encode"]
    drawn = np.asarray(axes.get_lines()[0].get_ydata())
    assert drawn == pytest.approx(found[0].curve.numpy())
    save_figure(plot_decompositions({"a": found[0]}), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SteersmanError, match="could not be written"):
        save_figure(plot_decompositions(found), tmp_path / "nowhere" / "curves.png")


def test_command(bundled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm, sae, features, folder = bundled
    v, w = contrast_of(lm, "rain", "snow"), contrast_of(lm, "fruit", "vegetables")
    v.save(tmp_path / "weather.safetensors")
    w.save(tmp_path / "food.safetensors")
    (tmp_path / "labels.json").write_text(json.dumps({str(f): name for name, f in features.items()}))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "some.txt").write_text("\n".join(texts(4, seed=11)))
    common = ["decompose", "--sae", str(folder / "sae"), "--vector", str(tmp_path / "weather.safetensors")]
    both = [*common, "--vector", str(tmp_path / "food.safetensors")]
    out, plot = tmp_path / "found.json", tmp_path / "found.png"
    main(
        [*both, "--k", "12", "--labels", str(tmp_path / "labels.json"), "--out", str(out), "--plot", str(plot),
         "--model", str(MODEL_PATH), "--text", str(tmp_path / "texts"), "--retention"]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert "rain" in text
    assert "reconstruction, equal norm" in text
    records = json.loads(out.read_text())
    assert [record["vector"] for record in records] == [str(tmp_path / f"{n}.safetensors") for n in ("weather", "food")]
    python = decompose(v, sae, k=12)
    assert [term["feature"] for term in records[0]["terms"]] == python.features.tolist()
    assert records[0]["retention"]["kept"][0]["name"] == "vector"
    assert plot.read_bytes().startswith(b"\x89PNG")
    main(
        [*common, "--method", "response", "--store", str(folder / "acts"), "--k", "5", "--rows", "64", "--n-null", "2"]
    )
    assert "response: 5 features" in capsys.readouterr().out
    main([*common, "--method", "encode"])
    assert "! the encoder activates" in capsys.readouterr().out
    assert "'contrast' needs --positive" in fails(capsys, *common, "--method", "contrast")
    assert "--retention needs --model and --text" in fails(capsys, *common, "--retention")
    assert "--k 300 is out of range" in fails(capsys, *common, "--k", "300")
    assert "penalty is a setting of lasso and nnls" in fails(capsys, *common, "--penalty", "0.1")
    other = SteeringVector.of(torch.ones(128), hook_name="blocks.1.hook_resid_post", model_name=v.model_name)
    other.save(tmp_path / "other.safetensors")
    wrong = ["decompose", "--sae", str(folder / "sae"), "--vector", str(tmp_path / "other.safetensors")]
    assert "made at 'blocks.1.hook_resid_post'" in fails(capsys, *wrong)
