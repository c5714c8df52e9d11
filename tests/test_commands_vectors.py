"""`steersman vector ...` and `steersman evaluate`, end to end on the bundled model."""

import json
from pathlib import Path

import pytest
import torch
from support.commands import fails
from support.tiny_models import with_text

from steersman import SteeringVector
from steersman.cli import main, usage
from steersman.demo import MODEL_PATH, texts
from steersman.lm import LanguageModel
from steersman.lm.lens import logit_lens
from steersman.sae import SAE, SAEConfig

MODEL = str(MODEL_PATH)
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with examples, texts and a vector, made by the command."""
    folder = tmp_path_factory.mktemp("vectors")
    pairs = [
        {"prompt": f"{name} saw the", "positive": " snow", "negative": " fog"} for name in ("Anna", "Tom", "Mia", "Ben")
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    (folder / "texts.txt").write_text("\n".join(texts(8, seed=3)) + "\n")
    (folder / "prompts.txt").write_text("Anna saw\nTom saw\nAt noon\n")
    main(
        ["vector", "make", "--model", MODEL, "--hook", HOOK, "--data", str(folder / "pairs.jsonl"), "--method", "caa",
         "--out", str(folder / "v.safetensors")]
    )  # fmt: skip
    return folder


def test_make_and_show(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    v = SteeringVector.load(work / "v.safetensors")
    assert (v.method, v.hook_name, v.model_name) == ("caa", HOOK, "steersman-demo")
    capsys.readouterr()
    path = str(work / "v.safetensors")
    main(["vector", "show", "--vector", path, "--vector", path, "--model", MODEL, "--top", "3"])
    shown = capsys.readouterr().out
    assert "agreement" in shown
    assert "promotes" in shown
    assert "1.000" in shown


def test_show_reads_tokens_as_features_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma stores the gain of its final norm less one."""
    made = with_text("gemma2")
    made.model.save_pretrained(tmp_path / "gemma")
    made.tokenizer.save_pretrained(tmp_path / "gemma")
    lm = LanguageModel.load(str(tmp_path / "gemma"), device="cpu")
    v = SteeringVector.of(torch.randn(16, generator=torch.Generator().manual_seed(0)), hook_name=HOOK)
    v.save(tmp_path / "v.safetensors")
    main(
        [
            "vector",
            "show",
            "--vector",
            str(tmp_path / "v.safetensors"),
            "--model",
            str(tmp_path / "gemma"),
            "--top",
            "5",
        ]
    )
    shown = capsys.readouterr().out
    ((raised, lowered),) = logit_lens(lm, v.vector[None], 5)
    assert f"{HOOK} promotes {' '.join(map(repr, raised))}\n" in shown
    assert f"{HOOK} suppresses {' '.join(map(repr, lowered))}\n" in shown
    W_U, norm = lm.unembed()
    assert norm is not None
    logits = v.vector * (1 + norm.get_parameter("weight")) @ W_U
    assert raised == [lm.tokenizer.decode([i]) for i in logits.topk(5).indices.tolist()]


def test_make_from_a_feature(work: Path) -> None:
    sae = SAE(SAEConfig(d_in=128, d_sae=32, k=4, architecture="topk", hook_name=HOOK, model_name="steersman-demo"))
    sae.save(work / "sae")
    out = str(work / "f.safetensors")
    main(["vector", "make", "--sae", str(work / "sae"), "--feature", "3", "--out", out])
    assert SteeringVector.load(out).vector.equal(SAE.load(work / "sae").W_dec[3].detach())


def test_calibrate(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(work / "scaled.safetensors")
    arguments = ["vector", "calibrate", "--vector", str(work / "v.safetensors"), "--model", MODEL, "--out", out]
    main([*arguments, "--text", str(work / "texts.txt"), "--target-kl", "0.3"])
    assert "converged in" in capsys.readouterr().out
    record = SteeringVector.load(out).metadata["calibration"]
    assert record["converged"]
    assert record["value"] == pytest.approx(0.3, rel=0.05)
    Path(out).unlink()
    line = fails(capsys, *arguments, "--text", str(work / "texts.txt"), "--target-kl", "100")
    assert "the kl budget of 100 is not reached" in line
    assert not Path(out).exists()
    assert "exactly one budget" in fails(capsys, *arguments)


def test_text_may_be_a_folder_everywhere(work: Path, tmp_path: Path) -> None:
    for name in ("prompts", "texts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "some.txt").write_bytes((work / f"{name}.txt").read_bytes())
    model = ["--vector", str(work / "v.safetensors"), "--model", MODEL]
    results = []
    for source in (work / "texts.txt", tmp_path / "texts"):
        out = tmp_path / f"{source.stem}.safetensors"
        main(["vector", "calibrate", *model, "--out", str(out), "--text", str(source), "--target-kl", "0.3"])
        results.append(SteeringVector.load(out))
    assert results[0].vector.equal(results[1].vector)
    main(
        ["evaluate", *model, "--prompts", str(tmp_path / "prompts"), "--text", str(tmp_path / "texts"),
         "--word", "snow", "--scale", "1.0", "--max-new-tokens", "4", "--out", str(tmp_path / "report")]
    )  # fmt: skip
    assert (tmp_path / "report" / "evaluation.json").is_file()


def test_convert(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    there, back = str(work / "v.gguf"), str(work / "back.safetensors")
    main(["vector", "convert", "--vector", str(work / "v.safetensors"), "--out", there])
    main(["vector", "convert", "--vector", there, "--out", back])
    v, w = SteeringVector.load(work / "v.safetensors"), SteeringVector.load(back)
    assert w.vector.equal(v.vector)
    assert w.metadata == v.metadata


def test_evaluate(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["evaluate", "--model", MODEL, "--vector", str(work / "v.safetensors"), "--prompts", str(work / "prompts.txt"),
         "--data", str(work / "pairs.jsonl"), "--text", str(work / "texts.txt"), "--word", "snow", "--word", "frost",
         "--scale", "0.5", "--scale", "1.0", "--max-new-tokens", "8", "--out", str(work / "report")]
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("unsteered", "random", "diffmean", "prompt", "word_rate", "margin"))
    data = json.loads((work / "report" / "evaluation.json").read_text())
    assert data["missing"] == {}
    assert [p["scale"] for p in data["arms"]["vector"]["points"]] == [0.0, 0.5, 1.0]


def test_groups_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["vector"], ["vector", "--help"]):
        main(argv)
        shown = capsys.readouterr().out
        assert "vector make" in shown
        assert "quickstart" not in shown
    assert "vector calibrate" in usage()
    assert "no command 'vector mak'; near it: vector make" in fails(capsys, "vector", "mak")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["make", "--out", "v.safetensors"], "make it from examples"),
        (
            ["make", "--data", "{}/pairs.jsonl", "--out", "v.safetensors"],
            "examples need --model, and --hook or --layer",
        ),
        (["make", "--data", "{}/none.jsonl", "--out", "v.safetensors"], "none.jsonl: no such file"),
        (["make", "--data", "{}/pairs.jsonl", "--positive", "x", "--out", "v"], "not both"),
        (["make", "--negative", "{}/texts.txt", "--out", "v"], "--negative needs --positive"),
        (["make", "--sae", "{}/none", "--out", "v"], "--sae needs --feature"),
        (["make", "--out", "v", "--lawyer", "3"], "no flag --lawyer; near it: --layer"),
        (["show", "--vector", "{}/none.safetensors"], "none.safetensors: no such file"),
        (["show", "--vector", "{}/texts.txt"], "not a safetensors file"),
        (["convert", "--vector", "{}/v.safetensors"], "out"),
    ],
)
def test_mistakes_get_one_line(work: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, "vector", *(arg.replace("{}", str(work)) for arg in argv))


def test_features_are_named_one_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = SAE(SAEConfig(d_in=8, d_sae=32, k=2, hook_name="blocks.0.hook_resid_post"))
    sae.save(tmp_path / "sae")
    make = ["vector", "make", "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "v.safetensors")]
    main([*make, "--feature", "3"])
    assert SteeringVector.load(tmp_path / "v.safetensors").vector.equal(sae.W_dec[3].detach())
    main([*make, "--feature", "3=2", "--feature", "5=-0.5"])
    expected = 2 * sae.W_dec[3].detach() - 0.5 * sae.W_dec[5].detach()
    assert torch.allclose(SteeringVector.load(tmp_path / "v.safetensors").vector, expected, atol=1e-6)
    for command in (["features", "--store", "x", "--model", "x"], ["evaluate", "--model", "x", "--vector", "x"]):
        more = ["--prompts", "x", "--out", "x"] if command[0] == "evaluate" else []
        with pytest.raises(SystemExit):
            main([*command, "--sae", "x", *more, "--feature", "3=2"])
        assert "feature '3=2': only the id is wanted here, such as 3" in capsys.readouterr().err
