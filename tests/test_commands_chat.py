"""Chat in the shell: `--chat` and `--system`, prompts from a file to lines of JSON, and what is made from messages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_toys import chat_model, talk
from support.commands import fails

from steersman import LanguageModel, Steerer, SteeringVector
from steersman.cli import main
from steersman.steer import steer_file

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that chats, a vector, and files of prompts."""
    folder = tmp_path_factory.mktemp("chat")
    lm = chat_model("llama3")
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    v = SteeringVector(directions={HOOK: torch.linspace(-2, 2, 16)}, model_name="model", method="test")
    v.save(folder / "v.safetensors")
    (folder / "prompts.txt").write_text("".join(f"w{i} w{i + 1}\n" for i in range(7)))
    talks = [talk("w1"), talk("w2", "w3", "w4")]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in talks))
    return folder


def steer_flags(folder: Path, *flags: str) -> list[str]:
    vector = ["--vector", str(folder / "v.safetensors")]
    return ["steer", "--model", str(folder / "model"), *vector, "--max-new-tokens", "4", *flags]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steer_chat_with_a_system_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*steer_flags(folder, "--chat", "--system", "w0", "--scope", "user", "--prompt", "w1 w2"), "--json"])
    found = json.loads(capsys.readouterr().out)
    lm = LanguageModel.load(folder / "model")
    with Steerer(lm).vector(SteeringVector.load(folder / "v.safetensors"), scope="user"):
        expected = lm.chat("w1 w2", system="w0", max_new_tokens=4)
    (pair,) = found["pairs"]
    assert pair["steered"] == expected.completions[0]
    assert pair["prompt"] == expected.prompts[0]
    assert found["n_steered"] == 6
    main([*steer_flags(folder, "--scope", "user", "--prompts", str(folder / "talks.jsonl")), "--json"])
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 2


def test_a_file_of_prompts_becomes_lines_and_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--chat", "--scope", "assistant", "--prompts", str(folder / "prompts.txt"), "--batch-size", "3"]
    main(steer_flags(folder, *flags, "--out", str(tmp_path / "all.jsonl")))
    assert "7 rows" in capsys.readouterr().out
    whole = lines(tmp_path / "all.jsonl")
    assert [record["row"] for record in whole] == list(range(7))
    assert whole[2]["messages"] == talk("w2 w3")
    assert {"prompt", "steered", "unsteered", "kl_mean"} <= set(whole[0])
    lm = LanguageModel.load(folder / "model")
    with Steerer(lm).vector(SteeringVector.load(folder / "v.safetensors"), scope="assistant"):
        assert [r["steered"] for r in whole[3:6]] == lm.chat(["w3 w4", "w4 w5", "w5 w6"], max_new_tokens=4).completions

    # stopped in the second batch, in the middle of a line
    part = tmp_path / "part.jsonl"
    first = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    part.write_text("".join(first[:4]) + first[4][:30])
    made: list[int] = []
    monkeypatch.setattr(steer_file, "_batches", _noting(steer_file._batches, made))
    main(steer_flags(folder, *flags, "--out", str(part)))
    assert made == [3]  # rows 4, 5 and 6
    assert [r["steered"] for r in lines(part)] == [r["steered"] for r in whole]
    made.clear()
    main(steer_flags(folder, *flags, "--out", str(part)))
    assert made == []  # it was finished


def _noting(batches: Any, made: list[int]) -> Any:
    def noted(prompts: Any, size: int) -> Any:
        for batch in batches(prompts, size):
            made.append(len(batch))
            yield batch

    return noted


def test_a_file_of_another_run_is_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.jsonl"
    main(steer_flags(folder, "--prompt", "w1", "--out", str(out)))
    before = out.read_bytes()
    other = steer_flags(folder, "--prompt", "w1", "--out", str(out), "--scope", "generation")
    assert "written with other settings" in fails(capsys, *other)
    assert out.read_bytes() == before
    out.write_text("no record\n")
    assert "no record of a run" in fails(capsys, *steer_flags(folder, "--prompt", "w1", "--out", str(out)))
    assert out.read_text() == "no record\n"


def test_vectors_from_messages_and_their_budget(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": f"w{i}", "positive": " w20", "negative": " w21"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    model = ["--model", str(folder / "model")]
    out = tmp_path / "made.safetensors"
    made = ["vector", "make", *model, "--data", str(tmp_path / "pairs.jsonl"), "--method", "caa", "--layer", "1"]
    main([*made, "--chat", "--out", str(out)])
    lm = LanguageModel.load(folder / "model")
    sides = [[(talk(f"w{i}"), word) for i in range(4)] for word in ("w20", "w21")]
    expected = SteeringVector.contrast(lm, *sides, hook=1, method="caa")
    v = SteeringVector.load(out)
    assert torch.allclose(v.directions[HOOK], expected.directions[HOOK], atol=1e-6)
    assert v.metadata["chat_template"] == lm.template_digest
    main([*made, "--out", str(tmp_path / "plain.safetensors")])
    assert "chat_template" not in SteeringVector.load(tmp_path / "plain.safetensors").metadata
    text = ["--text", str(folder / "talks.jsonl"), "--scope", "user", "--target-kl", "0.01"]
    main(["vector", "calibrate", *model, "--vector", str(folder / "v.safetensors"), *text, "--out", str(out)])
    assert SteeringVector.load(out).metadata["calibration"]["scope"] == "user"
    capsys.readouterr()


def test_cache_chat(folder: Path, tmp_path: Path, no_progress: None, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = ["--text", str(folder / "prompts.txt")], tmp_path / "acts"
    main(["cache", "--model", str(folder / "model"), *text, "--layer", "1", "--chat", "--out", str(out)])
    capsys.readouterr()
    config = json.loads((out / "manifest.json").read_text())["config"]
    assert config["chat_template"] == LanguageModel.load(folder / "model").template_digest


def test_evaluate_chat(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--vector", str(folder / "v.safetensors"), "--prompts", str(folder / "prompts.txt"), "--chat"]
    how = ["--scope", "assistant", "--max-new-tokens", "3", "--scale", "1", "--out", str(tmp_path / "report")]
    main(["evaluate", "--model", str(folder / "model"), *given, *how])
    capsys.readouterr()
    found = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert found["prompts"][0].startswith("<s> <|header|> user")


def test_a_model_without_a_template_says_so_in_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from steersman.demo import MODEL_PATH

    v = SteeringVector(
        directions={"blocks.2.hook_resid_post": torch.ones(128)}, model_name="steersman-demo", method="t"
    )
    v.save(tmp_path / "v.safetensors")
    flags = ["steer", "--model", str(MODEL_PATH), "--vector", str(tmp_path / "v.safetensors")]
    assert "has no chat template" in fails(capsys, *flags, "--chat")
    assert "has no chat template" in fails(capsys, *flags, "--scope", "assistant")
