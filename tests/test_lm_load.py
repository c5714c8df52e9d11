"""Loading from a folder, and one clear line for each way it fails."""

from pathlib import Path

import pytest
import torch
from tiny_models import D, build, with_text, word_tokenizer

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.load import parse_device, parse_dtype

STORIES = Path(__file__).resolve().parents[1].parent / "shared" / "models" / "stories260k"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lm = with_text("llama")
    lm.model.save_pretrained(tmp_path / "tiny")
    lm.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_load_a_decoder(folder: Path) -> None:
    lm = LanguageModel.load(str(folder), device="cpu")
    assert (lm.name, lm.n_layers, lm.d_model, lm.dtype) == ("tiny", 3, D, torch.float32)
    assert not lm.model.training
    ids = torch.tensor([[0, 5, 6]])
    assert torch.equal(lm.logits(ids), with_text("llama").logits(ids))
    half = LanguageModel.load(str(folder), device="cpu", dtype="bfloat16", name="mine")
    assert (half.dtype, half.name) == (torch.bfloat16, "mine")
    assert LanguageModel.load(str(folder), device="cpu", dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("family", ["bert", "esm"])
def test_load_an_encoder(family: str, tmp_path: Path) -> None:
    lm = build(family)
    lm.model.save_pretrained(tmp_path)
    word_tokenizer(cls_token="<s>", sep_token="</s>", pad_token="<pad>").save_pretrained(tmp_path)
    loaded = LanguageModel.load(str(tmp_path), device="cpu")
    assert type(loaded.model) is type(lm.model)
    assert not loaded.can_generate
    ids = torch.tensor([[4, 5, 6]])
    hook = "blocks.2.hook_resid_post"
    assert torch.equal(loaded.capture(ids, hooks=[hook])[hook], lm.capture(ids, hooks=[hook])[hook])


def test_missing_and_broken_folders(folder: Path, tmp_path: Path) -> None:
    def message(source: str) -> str:
        with pytest.raises(SteersmanError) as caught:
            LanguageModel.load(source, device="cpu")
        text = str(caught.value)
        assert "\n" not in text
        return text

    assert "no model folder at" in message(str(tmp_path / "nothing"))
    assert "no model folder at" in message("./nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in message(str(tmp_path / "empty"))
    (tmp_path / "file.txt").write_text("x")
    assert "is a file" in message(str(tmp_path / "file.txt"))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot load a model from" in message(str(folder))
    weights.unlink()
    assert "cannot load a model from" in message(str(folder))
    (folder / "config.json").write_text("{")
    assert "cannot load a model from" in message(str(folder))


def test_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no such\nrepository")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(SteersmanError, match="could not be fetched from the Hugging Face hub: no such repository"):
        LanguageModel.load("org/never-was")


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    import transformers

    transformers.T5Config(d_model=8).save_pretrained(tmp_path)
    with pytest.raises(SteersmanError, match="encoder-decoder"):
        LanguageModel.load(str(tmp_path), device="cpu")


def test_dtype_and_device_names() -> None:
    cpu = torch.device("cpu")
    assert parse_dtype(None, cpu) is torch.float32
    assert parse_dtype(None, torch.device("cuda")) == "auto"
    assert parse_dtype("torch.bfloat16", cpu) is torch.bfloat16
    with pytest.raises(SteersmanError, match="unknown dtype 'float7'"):
        parse_dtype("float7", cpu)
    with pytest.raises(SteersmanError, match="unknown device 'gpuu'"):
        parse_device("gpuu")


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260k model is not beside the repository")
def test_a_real_model() -> None:
    lm = LanguageModel.load(str(STORIES), device="cpu")
    assert lm.bos_token_id == 1
    ids = lm.token_ids("Once upon a time", bos=True)
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert lm.generate("Once upon a time", max_new_tokens=20).completions[0].startswith(", there was a little girl")
