"""`steersman activations`, `find`, `neighbours` and `compare`."""

import json
from pathlib import Path

import pytest
import torch
from support.commands import fails
from support.word_features import HOOK, word_model, word_sae

from steersman.cli import main
from steersman.sae import FeatureLabel, FeatureLabels
from steersman.steer import SteeringVector
from steersman.train import ActivationStore


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its SAE with a label, texts of two classes, a vector, and a store."""
    folder = tmp_path_factory.mktemp("look")
    lm = word_model()
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' w20 ' }}{% endfor %}"
    lm.model.save_pretrained(folder / "llama")
    lm.tokenizer.save_pretrained(folder / "llama")
    sae = word_sae(lm)
    sae.labels = FeatureLabels({3: FeatureLabel(text="the word w7")})
    sae.save(folder / "sae")
    sae.labels = FeatureLabels()
    sae.save(folder / "bare")
    (folder / "with.txt").write_text("".join(f"w7 w{i} w9\n" for i in range(20, 26)))
    (folder / "without.jsonl").write_text("".join(json.dumps({"text": f"w6 w{i} w9"}) + "\n" for i in range(20, 26)))
    direction = sae.W_dec[5].detach().clone()
    SteeringVector.of(direction, hook_name=HOOK, model_name=lm.name).save(folder / "v.safetensors")
    SteeringVector.of(direction, hook_name="blocks.1.hook_resid_post", model_name=lm.name).save(
        folder / "elsewhere.safetensors"
    )
    rows = torch.zeros(40, len(direction))
    rows[:10, 3] = rows[:8, 4] = rows[20:, 5] = 3.0
    ActivationStore.from_tensors([rows], folder / "acts", HOOK, model_name=lm.name, dtype="float32")
    (folder / "features.json").write_text(
        json.dumps([{"id": 4, "fires_on": ["w8\x1b[2J"], "promotes": [], "contexts": []}])
    )
    return folder


def printed(argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    main(argv.split())
    return capsys.readouterr().out


def test_activations_of_texts_files_and_chats(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = f"activations --model {work}/llama --sae {work}/sae "
    out = printed(base + "--text w7 --text w8", capsys)
    assert "the word w7" in out
    assert "text 2 of 2" in out
    assert "\x1b" not in out  # not a terminal
    found = json.loads(printed(base + f"--text {work}/with.txt --limit 2 --json --units max_act", capsys))
    assert [[one["feature"] for one in text["features"]] for text in found] == [[3, 5]] * 2
    assert found[0]["features"][0]["value"] == 1.0
    assert found[0]["tokens"][-1]["features"][0] == {"feature": 5, "value": 1.0, "label": ""}
    chat = json.loads(printed(base + "--text w7 --chat --json", capsys))
    assert "w20" in chat[0]["text"]
    assert [one["feature"] for one in chat[0]["features"]] == [3]


def test_find_by_texts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = f"find --model {work}/llama --sae {work}/sae --positive {work}/with.txt --negative {work}/without.jsonl "
    assert "the word w7" in printed(base, capsys)
    found = json.loads(printed(base + "--no-output --json", capsys))
    assert [(one["feature"], one["auroc"], one["output"]) for one in found["features"]] == [(3, 1.0, None)]


def test_find_by_words_and_direction(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(f"find --sae {work}/sae --words W7", capsys)
    assert out.split()[:4] == ["3", "in", "label", "the"]
    escaped = printed(f"find --sae {work}/bare --words w8 --features {work}/features.json", capsys)
    assert "4  in fires_on" in escaped
    assert "\x1b" not in escaped
    near = json.loads(printed(f"find --sae {work}/sae --vector {work}/v.safetensors --top 1 --json", capsys))
    assert near == [{"feature": 5, "cosine": 1.0, "label": ""}]


def test_neighbours(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"neighbours --sae {work}/sae --feature 3 --feature 5 --store {work}/acts --top 2"
    out = printed(command, capsys)
    assert "feature 3  the word w7" in out
    assert "fires together with, on 40 tokens" in out
    first, second = json.loads(printed(command + " --json", capsys))
    assert [(one["feature"], one["together"]) for one in first["coactivation"]] == [(4, 8)]
    assert second["coactivation"] == []
    assert len(first["decoder"]) == len(first["encoder"]) == 2


def test_compare(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    shown = printed(f"compare {work}/sae {work}/bare {work}/sae --out {out}", capsys)
    assert shown.startswith("A  ")
    assert "A B 1.000 1.000 1.000" in " ".join(shown.split())
    along = json.loads(printed(f"compare {work}/sae {work}/bare --feature 3 --json", capsys))["along"]
    assert [(one["feature"], one["label"]) for one in along] == [(3, "the word w7"), (3, "")]
    named = json.loads(printed(f"compare {work}/sae {work}/bare --store {work}/acts --json", capsys))
    assert ([sae["name"] for sae in named["saes"]], named["by"]) == (["sae", "bare"], "activations")
    assert all(pair["mcc"] == pytest.approx(1.0) for pair in json.loads(out.read_text())["pairs"])
    silent = [one["feature"] for one in named["pairs"][0]["unmatched"][0]]
    assert silent
    assert not {3, 4, 5} & set(silent), "these fire on the store's rows"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("activations --model {}/llama --sae {}/sae --text {}/nothing.txt", "no such file"),
        ("activations --model {}/llama --sae {}/sae --text w7 --top 0", "top is too small"),
        ("find --sae {}/sae", "find by one of"),
        ("find --sae {}/sae --words a --vector {}/v.safetensors", "got --words and --vector"),
        ("find --sae {}/bare --words a", "neither labels nor contexts"),
        ("find --sae {}/sae --words w7 --features {}/with.txt", "with.txt"),
        ("find --sae {}/sae --positive {}/with.txt", "--positive needs --negative"),
        ("find --sae {}/sae --positive {}/with.txt --negative {}/without.jsonl", "needs --model"),
        ("find --sae {}/sae --vector {}/elsewhere.safetensors", "blocks.1.hook_resid_post"),
        ("neighbours --sae {}/sae --feature 99", "out of range"),
        ("neighbours --sae {}/sae --feature 3 --by coactivation", "--store belong together"),
        ("compare {}/sae", "two SAEs or more"),
        ("compare {}/sae {}/bare --by activations", "rows of a store"),
        ("compare {}/sae {}/sae {}/nothing", "nothing"),
    ],
)
def test_mistakes_get_one_line(work: Path, argv: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in fails(capsys, *argv.replace("{}", str(work)).split())
