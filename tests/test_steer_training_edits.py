"""Trained edits that are no vectors: from examples, in files, and on the command line."""

from pathlib import Path
from typing import Any

import pytest
from support.commands import fails
from support.concept_lm import LAST, Planted, concept_lm
from support.runtime_contract import check_contract, check_off

from steersman import SteeringVector
from steersman.cli import main
from steersman.demo import MODEL_PATH, texts
from steersman.errors import SteersmanError
from steersman.steer import (
    EDIT_METHODS,
    EditSet,
    Steerer,
    TrainEditConfig,
    calibrate,
    edit_from_examples,
    load_steering,
    loreft,
    steered,
)

HOOKS = ["blocks.0.hook_resid_post", LAST]


@pytest.fixture(scope="module")
def planted() -> Planted:
    return concept_lm()


def share(planted: Planted, edits: EditSet | None, scale: float = 1.0) -> float:
    """How often the model writes the concept's words."""
    prompts = ["w50 w51", "w12 w44 w7", "w9", "w55 w20"] * 4
    with steered(edits or {}, planted.lm, scale=scale):
        out = planted.lm.generate(prompts, max_new_tokens=6, do_sample=True, seed=1)
    return float(((out.new_tokens >= 30) & (out.new_tokens < 40)).float().mean())


@pytest.fixture(scope="module")
def lowrank(planted: Planted) -> EditSet:
    positive, _ = planted.pairs(16)
    config = TrainEditConfig(lr=0.05, epochs=6, batch_size=8)
    return loreft(planted.lm, positive, hook=HOOKS, rank=2, config=config)


def test_a_low_rank_map_learns_the_concept(planted: Planted, lowrank: EditSet) -> None:
    assert lowrank.method == "loreft"
    assert list(lowrank) == HOOKS
    assert lowrank.metadata["loss"] < lowrank.metadata["loss_unsteered"] - 0.2
    assert share(planted, lowrank) > share(planted, None) + 0.2
    for edit in lowrank.values():
        rotation = edit.rotation  # pyright: ignore[reportAttributeAccessIssue]
        assert not rotation.requires_grad
        assert rotation.shape == (2, planted.lm.d_model)


def test_it_goes_through_everything_that_edits_do(planted: Planted, lowrank: EditSet, tmp_path: Path) -> None:
    lowrank.save(tmp_path / "e.safetensors")
    again = load_steering(tmp_path / "e.safetensors")
    assert isinstance(again, EditSet)
    ids = planted.lm.encode(["w5 w6 w7"]).input_ids
    outs = []
    for edits in (lowrank, again):
        with steered(edits, planted.lm):
            outs.append(planted.lm.logits(ids))
    assert outs[0].equal(outs[1])
    found = calibrate(again, planted.lm, target_kl=0.3, texts=["w5 w6 w7 w8", "w9 w10 w11"])
    assert found.search.converged
    assert found.vector.metadata["loss"] == lowrank.metadata["loss"]
    check_contract(planted.lm, lambda _rows: steered(again, planted.lm), acts=False)
    check_off(planted.lm, steered(again, planted.lm, scale=0.0))


@pytest.mark.parametrize("method", ["loreft", "psr"])
def test_from_examples_by_name(planted: Planted, method: str) -> None:
    positive, negative = planted.pairs(6)
    options: dict[str, Any] = {"hook": LAST, "method": method, "lr": 0.05, "epochs": 2, "train_batch": 3, "rank": 2}
    options |= {"instruction": "w30 w31 w32 ", "lr": 0.002} if method == "psr" else {}
    made = edit_from_examples(planted.lm, positive, negative, **options)
    assert (made.method, list(made)) == (method, [LAST])
    assert made.metadata["loss"] < made.metadata["loss_unsteered"]
    assert EDIT_METHODS[method].source.startswith("arXiv")
    with pytest.raises(SteersmanError, match="unknown method 'caa'; have loreft, psr"):
        edit_from_examples(planted.lm, positive, hook=LAST, method="caa")
    with pytest.raises(SteersmanError, match="reads the completions: leave out positions and table"):
        edit_from_examples(planted.lm, positive, hook=LAST, method=method, positions="last")


# The command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    lines = [
        f'{{"prompt": "{name} saw the", "positive": " snow", "negative": " fog"}}'
        for name in ("Anna", "Tom", "Mia", "Ben", "Leo", "Ida")
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "prompts.txt").write_text("Anna saw\nTom saw\n")
    (folder / "texts.txt").write_text("\n".join(texts(4, seed=3)) + "\n")
    return folder


def make(data: Path, method: str, *more: str, out: str = "out.safetensors") -> Path:
    flags = ["--model", str(MODEL_PATH), "--data", str(data / "pairs.jsonl"), "--layer", "1", "--method", method]
    main(["vector", "make", *flags, *more, "--out", str(data / out)])
    return data / out


@pytest.mark.parametrize("method", ["ssv", "reft_r1", "bipo", "latent"])
def test_trained_vectors_on_the_command_line(data: Path, method: str) -> None:
    quick = ["--steps", "5"] if method == "latent" else ["--epochs", "2", "--train-batch", "3"]
    v = SteeringVector.load(make(data, method, *quick, "--lr", "0.02"))
    assert (v.method, v.hook_name) == (method, "blocks.1.hook_resid_post")
    assert v.metadata["loss"] < v.metadata["loss_unsteered"]


def test_edits_on_the_command_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made, looked at, calibrated and steered by, as vectors are."""
    out = make(data, "loreft", "--epochs", "3", "--lr", "0.05", "--rank", "2")
    assert isinstance(load_steering(out), EditSet)
    capsys.readouterr()
    main(["inspect", str(out)])
    assert "loreft" in capsys.readouterr().out
    scaled = str(data / "scaled.safetensors")
    main(["vector", "calibrate", "--vector", str(out), "--model", str(MODEL_PATH), "--text", str(data / "texts.txt"),
          "--target-kl", "0.3", "--out", scaled])  # fmt: skip
    assert "converged" in capsys.readouterr().out
    main(["steer", "--model", str(MODEL_PATH), "--vector", scaled, "--prompts", str(data / "prompts.txt"),
          "--max-new-tokens", "4"])  # fmt: skip
    assert "Anna saw" in capsys.readouterr().out


WRONG = [
    (["--method", "loreft", "--layer", "1"], "method 'loreft' needs examples"),
    (["--method", "sae_ssv", "--layer", "1"], "method 'sae_ssv' needs examples (--data), --model and --sae"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_what_is_missing_is_said(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, "vector", "make", *flags, "--out", "x.safetensors")


def test_an_edit_is_no_control_vector(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(MODEL_PATH), "--data", str(data / "pairs.jsonl"), "--layer", "1", "--method", "loreft"]
    said = fails(capsys, "vector", "make", *flags, "--out", str(data / "x.gguf"))
    assert "whose file is .safetensors" in said


def test_nothing_is_left_open(planted: Planted, lowrank: EditSet) -> None:
    with steered(lowrank, Steerer(planted.lm)):
        pass
    assert share(planted, None) == share(planted, None)
