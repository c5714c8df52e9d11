"""`steersman effects` and `steersman target`: from a folder to a vector, and one line for each mistake."""

import json
from pathlib import Path

import pytest
from support.commands import fails
from support.effect_toys import TEXTS, quick, toy
from support.tiny_models import word_tokenizer

from steersman.cli import main
from steersman.errors import SteersmanError
from steersman.steer import parse_features
from steersman.steer.effects.map import EffectMap
from steersman.steer.vectors.vector import SteeringVector


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy's `llama`, `sae` and `texts.txt`."""
    folder = tmp_path_factory.mktemp("effects")
    lm, sae = toy()
    lm.model.save_pretrained(folder / "llama")
    word_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "llama")
    sae.save(folder / "sae")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return folder


def flags(folder: Path, out: str, *more: str) -> list[str]:
    config = quick()
    return [
        "effects", "--model", str(folder / "llama"), "--sae", str(folder / "sae"), "--out", str(folder / out),
        "--vectors", "random", "--n-vectors", "60", "--rollouts", "60", "--new-tokens", str(config.new_tokens),
        "--scale-rule", "kl", "--scale-target", "0.1", "--text", str(folder / "texts.txt"), "--scale-limit", "30",
        "--prompts", "w5 w6", "--prompts", "w7", *more,
    ]  # fmt: skip


def test_from_effects_to_a_vector(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(flags(files, "e"))
    said = capsys.readouterr().out
    assert "60 vectors at blocks.1.hook_resid_post of llama" in said
    assert "map.safetensors" in said
    main(["inspect", str(files / "e"), "--json", "--verify"])
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["complete"], found["vectors"]) == ("effects", True, 60)
    assert found["map"]["features"] == found["SAE"]["d_sae"]
    m = EffectMap.load(files / "e")
    feature = int(m.signal.argmax())
    target = ["target", "--effects", str(files / "e"), "--min-signal", "0", "--feature", f"{feature}=2"]
    main([*target, "--out", str(files / "v.safetensors")])
    v = SteeringVector.load(files / "v.safetensors")
    assert v.cosine(m.solve(feature, min_signal=0)) == pytest.approx(1.0)
    main([*target, "--out", str(files / "p.safetensors"), "--ridge", "0", "--bias-weight", "0.5"])
    expected = m.solve(feature, ridge=0, bias_weight=0.5, min_signal=0)
    assert SteeringVector.load(files / "p.safetensors").cosine(expected) == pytest.approx(1.0)
    capsys.readouterr()
    check = [
        "--verify",
        "--model",
        str(files / "llama"),
        "--sae",
        str(files / "sae"),
        "--text",
        str(files / "texts.txt"),
    ]
    main([*target, "--out", str(files / "v.safetensors"), *check, "--rollouts", "40"])
    said = capsys.readouterr().out
    assert "specificity" in said
    assert "side effect" in said


def test_run_again_it_measures_nothing_again(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(flags(files, "twice", "--fit", "none"))
    before = {p.name: p.stat().st_mtime_ns for p in (files / "twice").glob("0*")}
    assert not (files / "twice" / "map.safetensors").exists()
    main(flags(files, "twice", "--fit", "adam"))
    assert {p.name: p.stat().st_mtime_ns for p in (files / "twice").glob("0*")} == before
    assert EffectMap.load(files / "twice").provenance["method"] == "adam"
    assert "rollouts was 60, now 61" in fails(capsys, *flags(files, "twice", "--rollouts", "61"))


def test_targets_from_texts_and_by_rotation(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(flags(files, "texts"))
    (files / "yes.txt").write_text("w5 w6 w7\nw8\n")
    (files / "no.txt").write_text("w30 w31\nw32 w33\n")
    base = ["target", "--effects", str(files / "texts"), "--min-signal", "0", "--sae", str(files / "sae")]
    contrast = ["--positive", str(files / "yes.txt"), "--negative", str(files / "no.txt"), "--n-positive", "3"]
    contrast += ["--model", str(files / "llama")]
    main([*base, *contrast, "--max-density", "1", "--out", str(files / "f.safetensors")])
    assert SteeringVector.load(files / "f.safetensors").metadata["n_targets"] == 3
    main([*base, "--feature", "4", "--rotation", "--out", str(files / "r.safetensors")])
    assert SteeringVector.load(files / "r.safetensors").method == "sae_ts_rotation"
    assert "leave no feature" in fails(capsys, *base, *contrast, "--max-density", "0", "--out", str(files / "f.st"))


def test_mistakes_are_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(files / "x.safetensors")]
    assert "--out" in fails(capsys, "effects", "--model", "m", "--sae", "s")
    assert "needs --text" in fails(capsys, *flags(files, "z")[:15], "--scale-rule", "loss")
    assert "no such file" in fails(capsys, "target", "--effects", str(files / "nowhere"), "--feature", "1", *out)
    assert "name targets" in fails(capsys, "target", "--effects", str(files / "e"), *out)
    assert "needs --model" in fails(capsys, "target", "--effects", "e", "--feature", "1", "--verify", *out)
    assert "needs --sae" in fails(capsys, "target", "--effects", "e", "--feature", "1", "--rotation", *out)
    both = ["target", "--effects", "e", "--positive", "a.txt", *out]
    assert "both --positive and --negative" in fails(capsys, *both)


@pytest.mark.parametrize("given", [("a",), ("1=b",), ("1", "1=2")])
def test_targets_that_cannot_be_read(given: tuple[str, ...]) -> None:
    with pytest.raises(SteersmanError, match=r"not of the form|given twice"):
        parse_features(given)
