"""The command line: flags, YAML files, mistakes that get one line, and the main path from text to steered text."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import fails

from steersman.cli import COMMANDS, main, usage
from steersman.demo import MODEL_PATH, texts
from steersman.errors import SteersmanError
from steersman.sae import SAE, FeatureLabel, FeatureLabels, SAEConfig
from steersman.steer import FeatureScores
from steersman.steer.scores import Column
from steersman.train import ActivationStore

MODEL = str(MODEL_PATH)
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a store and an SAE, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "stories.txt").write_text("\n".join(texts(250, seed=11)) + "\n")
    text = str(folder / "stories.txt")
    main(["cache", "--model", MODEL, "--text", text, "--hook", HOOK, "--out", str(folder / "acts")])
    (folder / "train.yaml").write_text(f"store: {folder / 'acts'}\nd_sae: 128\nk: 8\nlog_every: 5\n")
    main(["train", "--config", str(folder / "train.yaml"), "--out", str(folder / "run"), "--k", "6"])
    return folder


def test_flags_win_over_the_file(work: Path) -> None:
    config = json.loads((work / "run" / "config.json").read_text())
    assert (config["training"]["d_sae"], config["training"]["k"], config["training"]["log_every"]) == (128, 6, 5)


def test_eval_begins_texts_as_the_store_does(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, acts = str(work / "stories.txt"), str(tmp_path / "acts")
    main(["cache", "--model", MODEL, "--text", text, "--layer", "2", "--tokens", "2k", "--no-bos", "--out", acts])
    found = []
    for more in ([], ["--no-bos"]):
        capsys.readouterr()
        main(["eval", "--sae", str(work / "run"), "--store", acts, "--model", MODEL, "--text", text, "--json", *more])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    main(
        ["eval", "--sae", str(work / "run"), "--store", str(work / "acts"), "--model", MODEL, "--text", text, "--json"]
    )
    assert json.loads(capsys.readouterr().out)["loss"]["ce_unsteered"] != found[0]["loss"]["ce_unsteered"]


def test_eval_measures_the_model_on_held_out_documents(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = str(work / "stories.txt"), str(work / "eval.json")
    main(
        [
            "eval",
            "--sae",
            str(work / "run"),
            "--store",
            str(work / "acts"),
            "--model",
            MODEL,
            "--text",
            text,
            "--out",
            out,
        ]
    )
    printed = capsys.readouterr().out
    result = json.loads(Path(out).read_text())
    assert "ce_recovered" in printed
    assert 0 < result["reconstruction"]["fvu"] < 1
    loss = result["loss"]
    assert loss["ce_unsteered"] < loss["ce_spliced"] < loss["ce_mean_ablated"]
    assert loss["n_predictions"] < 3000, "all documents were used, not the held-out ones"


def test_features_are_shown_and_saved(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["features", "--sae", str(work / "run"), "--store", str(work / "acts"), "--model", MODEL, "--top", "3"])
    printed = capsys.readouterr().out
    assert printed.count("density") == 3
    assert "«" in printed
    saved = json.loads((work / "run" / "features.json").read_text())
    assert [feature["id"] for feature in saved] == list(range(128))


def test_features_are_read_where_they_fit(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, acts = tmp_path / "sae", tmp_path / "acts"
    shutil.copytree(work / "run", sae, ignore=shutil.ignore_patterns("features*", "checkpoints"))

    def features() -> str:
        capsys.readouterr()
        main(_features(sae, acts))
        return capsys.readouterr().out

    def cache(n: int) -> None:
        rows = torch.randn(n, 128, generator=torch.Generator().manual_seed(0))
        ActivationStore.from_tensors([rows], acts, HOOK, model_name=MODEL_PATH.name, dtype="float32")

    def refused(*_: Any, **__: Any) -> Any:
        raise SteersmanError("a pass")

    cache(500)
    first = features()
    with monkeypatch.context() as patched:
        patched.setattr(ActivationStore, "batches", refused)
        assert features() == first.replace("written to", "read from")
        assert "a pass" in fails(capsys, *_features(sae, acts, "--contexts", "3"))
        text = (sae / "features.json").read_text()
        (sae / "features.json").write_text(text.replace('"id": 12,', '"id": 21,'))
        assert "a pass" in fails(capsys, *_features(sae, acts))
        (sae / "features.json").write_text(text)
        other = SAE.load(sae)
        with torch.no_grad():
            other.b_enc[3] += 0.5
        other.save(sae)
        assert "a pass" in fails(capsys, *_features(sae, acts))
    assert "written to" in features()
    assert "read from" in features()
    shutil.rmtree(acts)
    cache(501)
    assert "written to" in features()


def test_a_site_is_written_and_written_again_without_a_pass(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, site = tmp_path / "sae", tmp_path / "site"
    shutil.copytree(work / "run", sae, ignore=shutil.ignore_patterns("features*", "checkpoints"))
    column = Column(values=torch.arange(128.0), null=torch.zeros(128), null_max=0.0, unit="u", n=1, level=0.9)
    table = FeatureScores.of({"output": column}, model_name=MODEL, hook_name=HOOK, sae=SAE.load(sae))
    table.save(tmp_path / "scores.safetensors")
    flags = _features(sae, work / "acts", "--html", str(site))
    main([*flags, "--scores", str(tmp_path / "scores.safetensors")])
    assert f"open {site / 'index.html'}" in capsys.readouterr().out
    assert "<dt>output score<dd>12<" in (site / "features" / "12.html").read_text().replace("</div>", "<")
    FeatureLabels({12: FeatureLabel(text="rainy words")}).save(sae / "labels.jsonl")
    monkeypatch.setattr(ActivationStore, "batches", lambda *_, **__: pytest.fail("a pass"))
    main(flags)
    assert "feature 12   rainy words   density" in capsys.readouterr().out
    assert "<h1>Feature 12 <bdi>rainy words</bdi></h1>" in (site / "features" / "12.html").read_text()
    main([*flags[: flags.index("--html")], "--json"])
    assert json.loads(capsys.readouterr().out)[0]["label"] == "rainy words"
    with_scores = ["--scores", str(tmp_path / "scores.safetensors")]
    assert "give --html too" in fails(capsys, *_features(sae, work / "acts", *with_scores))
    (site / "mine.txt").write_text("mine")
    assert "mine.txt is no part of the site" in fails(capsys, *flags)


def _features(sae: Path, acts: Path, *flags: str) -> list[str]:
    return ["features", "--sae", str(sae), "--store", str(acts), "--model", MODEL, "--feature", "12", *flags]


def alive(work: Path) -> int:
    stats = SAE.load(work / "run").feature_stats
    assert stats is not None
    return int(stats.max_act.argmax())


def test_steer_compares_texts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["steer", "--model", MODEL, "--sae", str(work / "run"), "--feature", f"{alive(work)}=2", "--prompt", "One day"]
    )
    printed = capsys.readouterr().out
    assert "unsteered" in printed
    assert "KL per token" in printed


def test_train_straight_from_the_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--model", MODEL, "--text", str(work / "stories.txt"), "--hook", HOOK, "--buffer-rows", "4096"]
    main(["train", *source, "--out", str(work / "streamed"), "--d-sae", "64", "--k", "4", "--tokens", "10000"])
    assert "64 features" in capsys.readouterr().out
    assert SAE.load(work / "streamed").cfg.hook_name == HOOK


TRAIN = ["train", "--out", "{other}", "--d-sae", "8", "--k", "2"]
CACHE = ["cache", "--model", MODEL, "--out", "{other}"]
STEER = ["steer", "--model", MODEL, "--sae", "{run}"]
WITH_MODEL = ["--sae", "{run}", "--store", "{acts}", "--model", MODEL]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "no command 'trian'; near it: train"),
        ([*TRAIN, "--stroe", "{acts}"], "no flag --stroe; near it: --store"),
        (["train", "--out", "{other}", "--d-sae", "eight", "--k", "2"], "--d-sae"),
        (["train", "--out", "{other}"], "--d-sae"),
        ([*TRAIN[:-1], "9", "--store", "{acts}"], "--k 9 must lie between 1 and --d-sae 8"),
        (TRAIN, "nothing to train on"),
        ([*TRAIN, "--store", "{other}"], "{other}"),
        ([*TRAIN, "--store", "{acts}", "--hook", "blocks.0.hook_mlp_out"], "no hook point"),
        (["train", "--out", "{run}", *TRAIN[3:], "--store", "{acts}"], "another configuration"),
        (["train", "--config", "{other}"], "no such file"),
        ([*CACHE, "--text", "{other}", "--hook", HOOK], "no such file"),
        ([*CACHE, "--text", "{empty}", "--hook", HOOK], "empty.txt"),
        ([*CACHE, "--text", "{text}", "--hook", "blocks.9.hook_resid_post"], "4"),
        ([*CACHE, "--text", "{text}", "--hook", "blocks.2.hook_resid_pots"], "blocks.2.hook_resid_post"),
        (["cache", "--model", "{other}", "--text", "{text}", "--hook", HOOK, "--out", "{other}"], "{other}"),
        (["eval", "--sae", "{acts}", "--store", "{acts}"], "holds no SAE"),
        (["eval", *WITH_MODEL], "--model needs --text"),
        (["eval", "--sae", "{run}", "--store", "{acts}", "--tokens", "5"], "--tokens are for --baseline random"),
        (["features", *WITH_MODEL, "--feature", "128"], "128 is out of range"),
        ([*STEER, "--feature", "128=1"], "feature 128"),
        ([*STEER, "--feature", "x=1"], "feature 'x=1' is not of the form id or id=value"),
        ([*STEER, "--feature", "1=1", "--mode", "push"], "push"),
        (["quickstart", "--model", MODEL, "--out", "{other}"], "--model needs --text"),
    ],
)
def test_mistakes_get_one_line_and_code_2(
    argv: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "empty.txt").write_text("")
    paths = {"run": "run", "acts": "acts", "text": "stories.txt", "other": "other", "empty": "empty.txt"}
    given = {name: str(work / path) for name, path in paths.items()}
    assert message.format(**given) in fails(capsys, *(part.format(**given) for part in argv))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("d_sea: 8\n", "unknown key 'd_sea'; near it: d_sae"),
        ("- 1\n", "must hold a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_yaml_mistakes(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    assert message in fails(capsys, "train", "--config", str(file), "--out", "x")


def test_an_sae_of_another_width_is_refused(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = SAE.load(work / "run")
    narrow = SAE(SAEConfig(d_in=64, d_sae=8, k=2, hook_name=HOOK, model_name=sae.cfg.model_name))
    narrow.save(tmp_path)
    line = fails(capsys, "eval", "--sae", str(tmp_path), "--store", str(work / "acts"))
    assert "the SAE has width 64" in line
    assert "has width 128" in line


@pytest.mark.parametrize(
    "command", [["eval", "--store", "{acts}"], ["steer", "--model", MODEL, "--feature", "1=1", "--units", "raw"]]
)
def test_an_sae_of_another_model_is_refused(
    command: list[str], work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SAE(SAEConfig(d_in=128, d_sae=8, k=2, hook_name=HOOK, model_name="gpt2")).save(tmp_path)
    name, *more = (part.format(acts=work / "acts") for part in command)
    assert "gpt2" in fails(capsys, name, "--sae", str(tmp_path), *more)


def test_a_damaged_store_is_named(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(work / "acts", tmp_path / "acts")
    shard = max((tmp_path / "acts").rglob("*.safetensors"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-64])
    line = fails(
        capsys, "train", "--out", str(tmp_path / "run"), "--d-sae", "8", "--k", "2", "--store", str(tmp_path / "acts")
    )
    assert shard.name in line


def test_a_dead_feature_has_no_max_act(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = SAE.load(work / "run")
    assert sae.feature_stats is not None
    with torch.no_grad():
        sae.feature_stats.max_act[5] = 0
    sae.save(work / "dead")
    line = fails(
        capsys, "steer", "--model", MODEL, "--sae", str(work / "dead"), "--feature", "5=2", "--units", "max_act"
    )
    assert "5" in line
    assert "max_act" in line


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    assert printed.strip() == usage()
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


def test_the_installed_command_exits_with_2() -> None:
    command = [sys.executable, "-c", "from steersman.cli import main; main()", "train", "--nonsense", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "raised", "said"),
    [
        ("train", KeyboardInterrupt(), "interrupted; the same command resumes where it stopped"),
        ("evaluate", KeyboardInterrupt(), "interrupted"),
        ("effects", KeyboardInterrupt("2 of 3 shards are kept"), "2 of 3 shards are kept"),
    ],
)
def test_resuming_is_promised_by_commands_that_do(
    command: str,
    raised: KeyboardInterrupt,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(_: list[str]) -> None:
        raise raised

    monkeypatch.setattr("steersman.cli.run", stopped)
    with pytest.raises(SystemExit) as stop:
        main([command])
    assert stop.value.code == 130
    assert capsys.readouterr().err == f"steersman: {said}\n"
