"""`steersman train | sweep | cache`: what the flags reach, and what does not go together."""

import json
from pathlib import Path

import pytest

from steersman.cli import main
from steersman.demo import MODEL_PATH, texts
from steersman.sae import SAE

MODEL = str(MODEL_PATH)
HOOKS = ("blocks.1.hook_resid_post", "blocks.1.mlp.hook_post")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and a store of two hook points of different width, made by the command."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "stories.txt").write_text("\n".join(texts(60, seed=11)) + "\n")
    hooks = [part for hook in HOOKS for part in ("--hook", hook)]
    text = str(folder / "stories.txt")
    main(["cache", "--model", MODEL, "--text", text, *hooks, "--tokens", "4000", "--out", str(folder / "acts")])
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("steersman: ")]
    return line


def test_a_flag_and_a_yaml_list_may_name_several_hook_points(work: Path, tmp_path: Path) -> None:
    assert list(json.loads((work / "acts" / "manifest.json").read_text())["hooks"]) == list(HOOKS)
    file = tmp_path / "cache.yaml"
    file.write_text(f"hook: [{', '.join(HOOKS)}]\nmodel: {MODEL}\ntokens: 1e3\nmodel_dtype: float32\n")
    out = tmp_path / "acts"
    main(["cache", "--config", str(file), "--text", str(work / "stories.txt"), "--out", str(out)])
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["hooks"]) == list(HOOKS)
    assert (manifest["n_rows"], manifest["dtype"], manifest["config"]["model_dtype"]) == (1000, "float32", "float32")


def test_a_sweep_trains_each_combination(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = ["--ks", "2", "--ks", "4", "--hooks", HOOKS[0], "--hooks", HOOKS[1]]
    main(["sweep", "--store", str(work / "acts"), "--out", str(tmp_path / "sweep"), "--d-sae", "32", *lists])
    printed = capsys.readouterr().out
    names = {f"hook-{hook}_k-{k}" for hook in HOOKS for k in (2, 4)}
    assert {folder.name for folder in (tmp_path / "sweep").iterdir()} == names
    assert all(name in printed for name in names)
    one = SAE.load(tmp_path / "sweep" / f"hook-{HOOKS[1]}_k-4")
    main(["train", "--store", str(work / "acts"), "--hook", HOOKS[1], "--d-sae", "32", "--k", "4",
          "--out", str(tmp_path / "alone")])  # fmt: skip
    assert SAE.load(tmp_path / "alone").W_dec.equal(one.W_dec)


def test_streaming_has_the_settings_of_caching(work: Path, tmp_path: Path) -> None:
    def train(out: str, *flags: str) -> SAE:
        source = ["--model", MODEL, "--text", str(work / "stories.txt"), "--hook", HOOKS[0], "--buffer-rows", "2048"]
        sizes = ["--d-sae", "32", "--k", "2", "--tokens", "2000", "--batch-size", "200", "--model-batch-size", "2"]
        main(["train", *source, *sizes, "--out", str(tmp_path / out), *flags])
        return SAE.load(tmp_path / out)

    plain = train("plain")
    assert train("same", "--context-length", "256", "--packing").W_dec.equal(plain.W_dec)
    other = [train("short", "--context-length", "32"), train("rows", "--no-packing"), train("bos", "--no-exclude-bos")]
    other.append(train("exact", "--activation-dtype", "float32"))
    assert not any(sae.W_dec.equal(plain.W_dec) for sae in other)


def test_a_transcoder_of_a_stream_and_of_a_sweep(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--d-sae", "32", "--k", "2", "--tokens", "1000", "--hook-out", HOOKS[0], "--skip-connection"]
    source = ["--model", MODEL, "--text", str(work / "stories.txt"), "--buffer-rows", "1024", "--model-batch-size", "2"]
    main(["train", *source, *settings, "--hook", HOOKS[1], "--out", str(tmp_path / "streamed")])
    main(["sweep", "--store", str(work / "acts"), *settings, "--hooks", HOOKS[1], "--out", str(tmp_path / "sweep")])
    for run in ("streamed", f"sweep/hook-{HOOKS[1]}"):
        cfg = SAE.load(tmp_path / run).cfg
        assert (cfg.hook_name, cfg.hook_name_out, cfg.skip_connection) == (HOOKS[1], HOOKS[0], True)
    line = refused(capsys, "train", *source, *settings, "--hook", "blocks.9.hook_resid_post", "--out", "run")
    assert f"{HOOKS[0]} comes before blocks.9.hook_resid_post in the model" in line


def test_a_text_that_is_held_out_whole(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--model", MODEL, "--text", str(work / "stories.txt"), "--hook", HOOKS[0]]
    line = refused(capsys, "train", *source, "--d-sae", "32", "--k", "2", "--out", str(tmp_path / "run"))
    assert "no rows are left to train on beside those that are held out" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context-length", "64"], "--context-length is for training straight from a model"),
        (["--model-batch-size", "8"], "--model-batch-size is for training straight from a model"),
        (["--dtype", "bfloat16"], "--dtype is for training straight from a model"),
        (["--option", "p=0.5"], "architecture 'topk' has no option 'p'"),
        (["--option", "p"], "option 'p' is not of the form name=value"),
        (["--hook-out", "blocks.2.hook_mlp_out"], "holds no hook point 'blocks.2.hook_mlp_out'; it has"),
        (["--hook-out", HOOKS[0]], f"{HOOKS[0]} is what is read: a transcoder predicts another hook point"),
        (["--hook-out", HOOKS[1]], f"{HOOKS[1]} comes before {HOOKS[0]} in the model"),
        (["--skip-connection"], "is of a transcoder: say what it predicts with --hook-out"),
        (["--architecture", "topp"], "topk"),
    ],
)
def test_what_does_not_go_with_a_store(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    train = ["train", "--store", str(work / "acts"), "--d-sae", "32", "--k", "2", "--out", str(tmp_path / "run")]
    assert message in refused(capsys, *train, *flags)
    assert not (tmp_path / "run" / "cfg.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ks", "64"], "run k-64: --k 64 must lie between 1 and --d-sae 32"),
        ([], "--k 0 must lie between 1"),
        (["--ks", "2", "--hooks", "blocks.0.hook_mlp_out"], "no hook point 'blocks.0.hook_mlp_out'"),
        (["--ks", "2", "--runs", "none.yaml"], "not both"),
        (["--runs", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_mistakes_in_a_sweep(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    sweep = ["sweep", "--store", str(work / "acts"), "--d-sae", "32", "--out", str(tmp_path / "sweep")]
    assert message in refused(capsys, *sweep, *flags)


def test_old_names_of_flags_are_taken_and_told(work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = ["train", "--store", str(work / "acts"), "--d-sae", "32", "--k", "2", "--out", str(tmp_path / "run")]
    main([*train, "--activation", "batch_topk"])
    assert "--activation is called --architecture now" in caplog.text
    assert SAE.load(tmp_path / "run").cfg.architecture == "batch_topk"
