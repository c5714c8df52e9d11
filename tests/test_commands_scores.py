"""`steersman scores`: tables, what is selected, and mistakes."""

import json
from pathlib import Path

import pytest
from support.commands import fails
from support.word_features import HOOK, word_model, word_sae

from steersman.cli import main
from steersman.steer import FeatureScores


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its SAE, texts of two classes, and answers with rewards."""
    folder = tmp_path_factory.mktemp("scores")
    lm = word_model()
    lm.model.save_pretrained(folder / "llama")
    lm.tokenizer.save_pretrained(folder / "llama")
    word_sae(lm).save(folder / "sae")
    (folder / "with.txt").write_text("".join(f"w7 w{i} w9\n" for i in range(8, 16)))
    (folder / "without.txt").write_text("".join(f"w6 w{i} w9\n" for i in range(8, 16)))
    rows = [{"prompt": "w5", "answer": f" {word} w9", "reward": int(word == "w8")} for word in ("w8", "w7") * 6]
    (folder / "rewarded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_scores_are_shown_selected_and_written(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = f"scores --model {work}/llama --sae {work}/sae --score contrast --score f_statistic "
    main((base + f"--positive {work}/with.txt --negative {work}/without.txt --select 1 --out {work}/out").split())
    printed = capsys.readouterr().out
    assert f"{HOOK}  3=0.666667" in printed
    table = FeatureScores.load(work / "out" / f"{HOOK}.safetensors")
    assert list(table) == ["contrast", "f_statistic"]
    assert table.top("contrast", 1)[0].feature == 3


def test_rewarded_answers_and_json(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"scores --model {work}/llama --sae {work}/sae --score correlation --rewarded {work}/rewarded.jsonl --json"
    )
    main([*command.split(), "--select", "2", "--sign", "both"])
    found = json.loads(capsys.readouterr().out)
    assert found["selected"] == {HOOK: {"4": 2.0, "3": -0.0}}
    assert {entry["feature"] for entry in found["scores"][HOOK]["correlation"]} == {3, 4}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--score corelation", "unknown score 'corelation'"),
        ("--score correlation", "needs --positive and --negative texts"),
        ("--score input", "needs texts to read"),
        ("--score correlation --rewarded {}/with.txt", "with.txt: line 1"),
        ("--score correlation --rewarded {}/x --positive {}/with.txt --negative {}/with.txt", "not both"),
    ],
)
def test_mistakes_get_one_line(work: Path, flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = f"scores --model {work}/llama --sae {work}/sae {flags.replace('{}', str(work))}"
    assert said in fails(capsys, *argv.split())
