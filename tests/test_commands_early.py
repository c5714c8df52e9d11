"""Mistakes that can be seen before a model is loaded are told before: the model named here is nowhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import fails
from support.effect_toys import HOOK, quick, toy
from support.tiny_models import D, toy_sae

from steersman.steer import SteeringVector
from steersman.steer.effects.folder import Effects


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an SAE, a map, a zero vector and one that is not, texts and examples of several kinds."""
    folder = tmp_path_factory.mktemp("early")
    sae = toy_sae(HOOK)
    sae.save(folder / "sae")
    SteeringVector.of(torch.ones(D), hook_name=HOOK).save(folder / "v.safetensors")
    SteeringVector.of(torch.zeros(D), hook_name=HOOK).save(folder / "zero.safetensors")
    x = torch.randn(60, D)
    measured = Effects.from_tensors(x, x @ torch.randn(D, 40), sae=sae)
    measured.manifest.settings.update(quick(scale_rule="kl").identity())
    measured.fit(ridge=1.0).save(folder / "map.safetensors")
    (folder / "texts.txt").write_text("one\ntwo\nthree\n")
    (folder / "one.txt").write_text("one\n")
    pairs: list[dict[str, Any]] = [{"positive": f"good {i}\u2028", "negative": f"bad {i}"} for i in range(3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs))
    answers = [{"prompt": "Is it?", "positive": " Yes", "negative": " No"}]
    (folder / "answers.jsonl").write_text("".join(json.dumps(p) + "\n" for p in answers))
    return folder


MAKE = "vector make --model {}/nowhere --hook h --out {}/out/v.safetensors "
EFFECTS = "effects --model {}/nowhere --sae {}/sae --out {}/out/e --scale-rule norm "
EVALUATE = "evaluate --model {}/nowhere --out {}/out/r "
TARGET = "target --model {}/nowhere --sae {}/sae --effects {}/map.safetensors --out {}/out/v --feature 1 --verify "
DECOMPOSE = "decompose --vector {}/v.safetensors --sae {}/sae --model {}/nowhere "


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (MAKE + "--method caa --data {}/pairs.jsonl", "'caa' reads the answer to a prompt, and positive example 0"),
        (MAKE + "--method lat --data {}/pairs.jsonl --positions index:x", "unknown positions 'index:x'"),
        (MAKE + "--method lat --data {}/pairs.jsonl --positions index:--1", "unknown positions"),
        (MAKE + "--method caa --positive {}/texts.txt --negative {}/one.txt --positions last", "as many negatives"),
        (MAKE + "--method pca --data {}/pairs.jsonl --positions all", "needs one state per text"),
        (MAKE + "--method diffmean --positive {}/texts.txt", "there are no negative examples"),
        (MAKE + "--method actadd --data {}/pairs.jsonl --positions last", "leave out positions"),
        (MAKE + "--method optimised --data {}/pairs.jsonl --steps 0", "steps must be at least 1"),
        (MAKE + "--method probe --data {}/pairs.jsonl --l2 0", "l2 must be above 0"),
        (MAKE + "--data {}/pairs.jsonl --batch-size 0", "must be at least 1, got 0"),
        (EFFECTS + "--vectors random --n-vectors 18", "16 vectors are too few for a map of width 16"),
        (EFFECTS + "--vectors decoder --n-vectors 5 --fit adam", "too few"),
        (EFFECTS + "--fit adam", "fits what was measured by steering"),
        (EFFECTS + "--vector-files {}/v.safetensors", "1 vectors are too few"),
        (EFFECTS + "--fit adam --ridge 1", "--ridge is a setting of --fit closed"),
        (EFFECTS + "--heldout 1", "--heldout is a fraction"),
        (EFFECTS + "--ridge -1", "ridge must be 0 or more"),
        (EFFECTS + "--vectors decoder --scale-rule loss", "needs --text"),
        (EVALUATE + "--vector {}/v.safetensors --prompts {}/one.txt", "at least 2 prompts are needed"),
        (EVALUATE + "--vector {}/zero.safetensors --prompts {}/texts.txt", "is zero"),
        (EVALUATE + "--vector {}/v.safetensors --prompts {}/texts.txt --feature 1", "features need the SAE"),
        ("vector calibrate --model {}/nowhere --vector {}/v.safetensors --out {}/out/v", "exactly one budget"),
        (
            "vector calibrate --model {}/nowhere --vector {}/zero.safetensors --out {}/out/v --target-kl 1",
            "is zero",
        ),
        (TARGET, "measures on held-out text"),
        (TARGET + "--scale 1 --rollouts 1", "rollouts must be at least 2"),
        (TARGET + "--scale nan", "the scale must be a finite number"),
        (DECOMPOSE + "--method response", "needs activations="),
        (DECOMPOSE + "--positive {}/texts.txt", "does not read"),
        (DECOMPOSE + "--labels {}/nothing.json", "nothing.json"),
    ],
)
def test_before_the_model(command: str, said: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in fails(capsys, *(word.replace("{}", str(files)) for word in command.split()))


def test_what_cannot_be_written_to_is_found_before_the_model(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "nowhere", "--sae", str(files / "sae"), "--scale-rule", "norm", "--out", str(files)]
    assert "holds no effects" in fails(capsys, "effects", *flags)


def test_decompose_looks_at_the_vector_before_it_reads_a_store() -> None:
    from steersman import SteersmanError, decompose

    def read() -> Any:
        pytest.fail("read")
        yield

    _, sae = toy()
    with pytest.raises(SteersmanError, match="has shape"):
        decompose(torch.ones(D + 1), sae, method="response", activations=read())
    with pytest.raises(SteersmanError, match="k = 99 is out of range"):
        decompose(torch.ones(D), sae, method="response", activations=read(), k=99)


def test_pairs_of_texts_may_hold_separators_of_lines(files: Path) -> None:
    from steersman.steer.methods import read_examples

    assert read_examples(files / "pairs.jsonl").positive[2].text == "good 2\u2028"
