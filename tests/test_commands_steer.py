"""`steersman steer`: by features, by vectors and by both, over the prompts of flags and files, in every scope."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from support.commands import fails

from steersman.cli import main
from steersman.demo import MODEL_PATH
from steersman.lm import LanguageModel
from steersman.sae import SAE, SAEConfig
from steersman.steer import SteerConfig, Steerer, SteeringVector

MODEL, HOOK = str(MODEL_PATH), "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE and two vectors of the bundled model, and a file of prompts."""
    folder = tmp_path_factory.mktemp("steer")
    generator = torch.Generator().manual_seed(0)
    SAE(SAEConfig(d_in=128, d_sae=16, k=4, hook_name=HOOK, model_name="steersman-demo")).save(folder / "sae")
    for name, layer in (("a", 2), ("b", 1)):
        direction = 3 * torch.randn(128, generator=generator)
        SteeringVector(
            directions={f"blocks.{layer}.hook_resid_post": direction}, model_name="steersman-demo", method="test"
        ).save(folder / f"{name}.safetensors")
    (folder / "prompts.txt").write_text("One day\nThe dog\n")
    return folder


def steer(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    capsys.readouterr()
    main(["steer", "--model", MODEL, "--max-new-tokens", "5", *flags, "--json"])
    return json.loads(capsys.readouterr().out)


def test_vectors_and_features_steer_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = folder / "a.safetensors", folder / "b.safetensors", folder / "new" / "out.json"
    flags = ["--vector", f"{a}=2", "--vector", str(b), "--sae", str(folder / "sae"), "--feature", "3=6"]
    found = steer(capsys, *flags, "--prompts", str(folder / "prompts.txt"), "--prompt", "Then", "--out", str(out))
    assert [pair["prompt"] for pair in found["pairs"]] == ["Then", "One day", "The dog"]
    assert json.loads(out.read_text()) == found
    lm, v, w = LanguageModel.load(MODEL), SteeringVector.load(a), SteeringVector.load(b)
    sae = SAE.load(folder / "sae")
    prompts = ["Then", "One day", "The dog"]
    with Steerer(lm).features(sae, {3: 6.0}), Steerer(lm).vector(v, scale=2.0), Steerer(lm).vector(w):
        expected = lm.generate(prompts, max_new_tokens=5).completions
    assert [pair["steered"] for pair in found["pairs"]] == expected
    assert [pair["unsteered"] for pair in found["pairs"]] == lm.generate(prompts, max_new_tokens=5).completions
    assert found["edit"]["features"][0]["feature"] == 3


@pytest.mark.parametrize("scope", ["2:10", "tokens:15,27", "last_prompt", "all"])
@pytest.mark.parametrize("prompt", ["One day", ""])
def test_scopes_that_meet_few_tokens_or_none(
    folder: Path, capsys: pytest.CaptureFixture[str], scope: str, prompt: str
) -> None:
    flags = ["--sae", str(folder / "sae"), "--feature", "3=6", "--scope", scope, "--prompt", prompt]
    found = steer(capsys, *flags)
    assert len(found["pairs"]) == 1
    assert (found["edit"] is None) == (found["n_steered"] == 0)


def test_the_table_names_both_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["steer", "--model", MODEL, "--vector", str(folder / "a.safetensors"), "--max-new-tokens", "4"])
    printed = capsys.readouterr().out
    assert "prompt: Once upon a time" in printed
    assert "unsteered" in printed
    assert "no token was steered" not in printed


def test_units_are_the_same_in_the_shell_and_in_python() -> None:
    assert SteerConfig().units == inspect.signature(Steerer.features).parameters["units"].default


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --feature id=strength with --sae, --vector FILE or --recipe FILE"),
        (["--feature", "1"], "--feature needs --sae"),
        (["--vector", "{a}=two"], "'two' is no scale"),
        (["--vector", "{a}=inf"], "finite"),
        (["--vector", "{other}"], "{other}"),
        (["--vector", "{a}", "--prompts", "{other}.txt"], "no such file"),
        (["--vector", "{a}", "--top-p", "0.9"], "--top-p needs a temperature above 0"),
        (["--vector", "{a}", "--scope", "10:2"], "window 10:2 is empty"),
        (["--vector", "{a}", "--hook", HOOK, "--layer", "2"], "either --hook or --layer"),
        (["--vector", "{a}", "--layer", "-9"], "has 4 layers, so -4 to 3"),
    ],
)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    names = {"a": str(folder / "a.safetensors"), "other": str(folder / "other")}
    flags = [flag.format(**names) for flag in flags]
    assert message.format(**names) in fails(capsys, "steer", "--model", MODEL, *flags)


def test_no_bos_is_the_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vector = ["--vector", f"{folder / 'a.safetensors'}=0"]
    lm = LanguageModel.load(MODEL, bos=False)
    found = steer(capsys, *vector, "--no-bos", "--prompt", "One day")
    assert found["pairs"][0]["steered"] == lm.generate("One day", max_new_tokens=5).completions[0]


def test_a_recipe_steers_as_its_edits_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.yaml").write_text(
        "model: steersman-demo\nedits:\n  - {vector: a.safetensors, scale: 2}\n"
        "  - {vector: b.safetensors, scope: generation}\n"
    )
    found = steer(capsys, "--recipe", str(folder / "recipe.yaml"), "--prompt", "One day")
    lm, v, w = (LanguageModel.load(MODEL), *(SteeringVector.load(folder / f"{n}.safetensors") for n in "ab"))
    with Steerer(lm).vector(v, scale=2.0), Steerer(lm).vector(w, scope="generation"):
        expected = lm.generate(["One day"], max_new_tokens=5).completions
    assert [pair["steered"] for pair in found["pairs"]] == expected
    (folder / "wrong.yaml").write_text("edits:\n  - vektor: a.safetensors\n")
    line = fails(capsys, "steer", "--model", "nowhere", "--recipe", str(folder / "wrong.yaml"))
    assert "edit 1: unknown key 'vektor'; near it: vector" in line
