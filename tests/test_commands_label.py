"""`steersman label`, and labels wherever a feature's id is shown."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import fails
from support.label_server import LabelServer, knowing, label_server
from support.word_features import HOOK, WORDS, L, word_model, word_sae

from steersman.cli import main
from steersman.sae import SAE, FeatureLabel, FeatureLabels
from steersman.steer import SteeringVector
from steersman.train import cache_activations

Label = Callable[..., str]
MARKED = re.compile("<<\\W*w11\\W*>>")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which feature j fires on the word w(4 + j) alone, its SAE, and a store of texts."""
    folder = tmp_path_factory.mktemp("label")
    lm = word_model()
    lm.model.save_pretrained(folder / "llama")
    lm.tokenizer.save_pretrained(folder / "llama")
    word_sae(lm).save(folder / "sae")
    texts = [" ".join(f"w{4 + (5 * i + j * j) % 26}" for j in range(10)) for i in range(120)]
    cache_activations(lm, texts, hook=HOOK, out=folder / "acts", tokens=1200)
    (folder / "with.txt").write_text("w7 w6 w17\nw18 w7 w4\n")
    (folder / "without.txt").write_text("w8 w6 w17\nw18 w8 w4\n")
    SteeringVector.of_feature(word_sae(lm), 3).save(folder / "v.safetensors")
    return folder


@pytest.fixture
def label(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_progress: None) -> Label:
    """Run `steersman label` into a folder of its own; what it printed."""

    def run(*flags: str, model: bool = True) -> str:
        capsys.readouterr()
        named = ["--model", str(work / "llama")] if model else []
        main(["label", "--sae", str(work / "sae"), "--out", str(tmp_path / "labels.jsonl"), *named, *flags])
        return capsys.readouterr().out

    return run


def test_labels_say_what_fires_and_what_is_written(
    label: Label, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = label("--store", str(work / "acts"))
    labels = FeatureLabels.load(tmp_path / "labels.jsonl")
    for j in range(WORDS):
        assert labels.text(j).split(" ")[0].rstrip(",") == f"w{4 + j}"
        assert labels[j].source.startswith("contexts")
    assert all(labels.text(j).startswith("-> ") for j in (12, 13) if j in labels), "these never fire"
    assert f"{len(labels)} of {L} features have labels" in printed
    labels.check(SAE.load(work / "sae").cfg)
    before = (tmp_path / "labels.jsonl").read_bytes()
    monkeypatch.setattr("steersman.steer.labels.tokens.token_change", None)  # all of it is in the journal
    label("--store", str(work / "acts"))
    assert (tmp_path / "labels.jsonl").read_bytes() == before


def test_what_others_wrote_stays(label: Label, tmp_path: Path) -> None:
    mine = {3: FeatureLabel(text="mine"), 4: FeatureLabel(text="theirs", source="neuronpedia"),
            5: FeatureLabel(text="old", source="vocab")}  # fmt: skip
    FeatureLabels(mine).save(tmp_path / "labels.jsonl")
    label("--change-texts", "0", "--null-directions", "0")
    kept = FeatureLabels.load(tmp_path / "labels.jsonl")
    assert [kept.text(3), kept.text(4)] == ["mine", "theirs"]
    assert kept.text(5) != "old"
    label("--change-texts", "0", "--null-directions", "0", "--replace")
    assert FeatureLabels.load(tmp_path / "labels.jsonl").text(3) != "mine"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LabelServer]:
    monkeypatch.delenv("STEERSMAN_LABEL_KEY", raising=False)
    with label_server() as running:
        yield running


def asking(work: Path, server: LabelServer, *more: str) -> list[str]:
    flags = [
        "--store",
        str(work / "acts"),
        "--label-endpoint",
        server.url,
        "--label-model",
        "toy",
        "--change-texts",
        "0",
    ]
    return [*flags, "--feature", "3", "--feature", "7", "--feature", "13", "--retries", "0", *more]


def test_an_endpoint_is_asked_after_its_cost_is_known(
    label: Label, work: Path, server: LabelServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = label(*asking(work, server, "--estimate"))
    assert "2 features: 30 requests, about" in printed  # 1 and 14 about each: of 14 and 15 texts that fire, and 20
    assert not server.requests
    argv = ["label", "--sae", str(work / "sae"), "--model", str(work / "llama"), "--out", str(tmp_path / "l.jsonl")]
    assert "give --max-requests 30" in fails(capsys, *argv, *asking(work, server, "--max-requests", "29"))
    assert not server.requests
    printed = label(*asking(work, server))
    labels = FeatureLabels.load(tmp_path / "labels.jsonl")
    assert labels[3] == FeatureLabel(text="the word w7", source="toy", scores={"detection": 1.0, "fuzzing": 1.0})
    assert labels.text(7) == "the word w11"
    assert not labels.text(13), "what never fires is shown to nobody"
    assert "1 left out: no text to show" in printed
    assert len(server.requests) == 30


def test_an_endpoint_that_fails_leaves_what_came_and_code_75(
    label: Label, work: Path, server: LabelServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda messages: (500, {}, "") if MARKED.search(messages[1]["content"]) else knowing(messages)
    with pytest.raises(SystemExit) as stop:
        label(*asking(work, server))
    assert stop.value.code == 75
    told = capsys.readouterr()
    assert "no label: 1 (7)" in told.out
    assert "HTTP 500" in told.err
    labels = FeatureLabels.load(tmp_path / "labels.jsonl")
    assert labels.text(3) == "the word w7"
    assert labels[7].source != "toy"
    assert labels.text(7), "the label of its tokens stands in"
    server.answer, asked = knowing, len(server.requests)
    label(*asking(work, server))
    assert FeatureLabels.load(tmp_path / "labels.jsonl").text(7) == "the word w11"
    assert len(server.requests) - asked == 15, "what was answered is not asked again"


def test_an_endpoint_that_refuses_is_a_mistake(
    work: Path, server: LabelServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda messages: (401, {}, "who are you?")
    argv = ["label", "--sae", str(work / "sae"), "--model", str(work / "llama"), "--out", str(tmp_path / "l.jsonl")]
    assert "does not take the key" in fails(capsys, *argv, *asking(work, server))
    assert FeatureLabels.load(tmp_path / "l.jsonl").text(3), "the label of its tokens is there"


def test_neuronpedia_in_and_out(label: Label, tmp_path: Path) -> None:
    rows = [{"modelId": "toy", "layer": "0-res", "index": str(j), "description": f"word {j}"} for j in range(3)]
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    name = ["--neuronpedia-id", "toy/0-res"]
    label(
        "--from-neuronpedia",
        str(tmp_path / "in.jsonl.gz"),
        "--to-neuronpedia",
        str(tmp_path / "np"),
        *name,
        model=False,
    )
    assert FeatureLabels.load(tmp_path / "labels.jsonl").text(2) == "word 2"
    (tmp_path / "labels.jsonl").unlink()
    label("--from-neuronpedia", str(tmp_path / "np"), model=False)
    assert FeatureLabels.load(tmp_path / "labels.jsonl").text(2) == "word 2"


def test_features_go_out_with_their_texts(label: Label, work: Path, tmp_path: Path) -> None:
    out = ["--to-neuronpedia", str(tmp_path / "np"), "--neuronpedia-id", "toy/0-res", "--feature", "3"]
    label("--store", str(work / "acts"), "--change-texts", "0", *out)
    (body,) = json.loads((tmp_path / "np" / "upload" / "batch-0.json").read_text())["features"]
    assert body["explanations"][0]["text"].startswith("w7")
    for text in body["activations"]:
        active = {token.strip() for token, value in zip(text["tokens"], text["values"]) if value > 0}
        assert active == {"w7"}
    (page,) = json.loads((tmp_path / "np" / "dashboards" / "batch-0.json").read_text())["features"]
    assert len(page["activations"]) == len(body["activations"])


@pytest.mark.parametrize(
    "command",
    [
        "features --store {}/acts --feature 3 --out {out}",
        "scores --score contrast --positive {}/with.txt --negative {}/without.txt",
        "steer --feature 3=50 --prompt w7 --max-new-tokens 2",
        "decompose --vector {}/v.safetensors --method omp --k 2",
        "activations --text w7",
        "find --words number --top 20",
        "neighbours --feature 3",
    ],
    ids=lambda command: command.split()[0],
)
def test_labels_stand_where_ids_do(
    command: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_progress: None
) -> None:
    labels = FeatureLabels({j: FeatureLabel(text=f"the word\x1b[2J number {j}") for j in range(L)})
    labels.of(SAE.load(work / "sae").cfg).save(tmp_path / "mine.jsonl")
    out = tmp_path / "features.json"
    argv = [
        *command.replace("{out}", str(out)).replace("{}", str(work)).split(),
        "--labels",
        str(tmp_path / "mine.jsonl"),
    ]
    modelless = command.split()[0] in ("decompose", "find", "neighbours")
    argv += ["--sae", str(work / "sae"), *([] if modelless else ["--model", str(work / "llama")])]
    main(argv)
    printed = capsys.readouterr().out
    assert "the word\\x1b[2J number 3" in printed
    assert "\x1b" not in printed
    main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out)

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if "label" in value:
                yield value["label"]
            for entry in value.values():
                yield from texts(entry)
        elif isinstance(value, list):
            for entry in value:
                yield from texts(entry)

    assert "the word\x1b[2J number 3" in set(texts(found))


def test_mistakes_are_one_line(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["label", "--sae", str(work / "sae")]
    model = ["--model", str(work / "llama")]
    (tmp_path / "other.jsonl").write_text('{"d_sae": 99}\n{"feature": 1, "label": "x"}\n')
    (tmp_path / "features.json").write_text('[{"id": 99}]')
    for flags, words in (
        ([], "nothing to make labels from"),
        (["--label-endpoint", "http://x/v1", *model], "go together"),
        (["--label-endpoint", "http://x/v1", "--label-model", "m", *model], "needs --store"),
        ([*model, "--out", str(tmp_path / "other.jsonl")], "labels of another SAE: of d_sae 99"),
        ([*model, "--features", str(tmp_path / "features.json")], "feature 99 is out of range"),
        ([*model, "--feature", "99"], "feature 99 is out of range"),
        (["--to-neuronpedia", str(tmp_path / "np")], "needs --neuronpedia-id"),
    ):
        assert words in fails(capsys, *argv, *flags)
