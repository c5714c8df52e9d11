"""Loading from a folder, and one clear line for each way it fails."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import answers, start_ranks
from support.tiny_models import D, build, with_text, word_tokenizer

from steersman.demo import MODEL_PATH
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.load import parse_dtype
from steersman.train import ActivationStore, cache_activations

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


def test_dtype_names() -> None:
    cpu = torch.device("cpu")
    assert parse_dtype(None, cpu) is torch.float32
    assert parse_dtype(None, torch.device("cuda")) == "auto"
    assert parse_dtype("torch.bfloat16", cpu) is torch.bfloat16
    with pytest.raises(SteersmanError, match="unknown dtype 'float7'"):
        parse_dtype("float7", cpu)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260k model is not beside the repository")
def test_a_real_model() -> None:
    lm = LanguageModel.load(str(STORIES), device="cpu")
    assert lm.bos_token_id == 1
    ids = lm.token_ids("Once upon a time", bos=True)
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert lm.generate("Once upon a time", max_new_tokens=20).completions[0].startswith(", there was a little girl")


# Models that one device does not hold

IDS = torch.tensor([[0, 5, 6, 7]])
POINT = "blocks.1.hook_resid_post"


def test_a_device_map_changes_nothing(folder: Path) -> None:
    pytest.importorskip("accelerate")
    plain = LanguageModel.load(str(folder), device="cpu")
    spread = LanguageModel.load(str(folder), device="cpu", device_map={"": "cpu"})
    assert torch.equal(spread.capture(IDS, hooks=[POINT])[POINT], plain.capture(IDS, hooks=[POINT])[POINT])
    with plain.edit(POINT, lambda h, now: h + 1):
        expected = plain.logits(IDS)
    with spread.edit(POINT, lambda h, now: h + 1):
        assert torch.equal(spread.logits(IDS), expected)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_quantized_weights(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    x = LanguageModel.load(str(folder), device="cpu").capture(IDS, hooks=[POINT])[POINT]
    lm = LanguageModel.load(str(folder), device="cpu", quantization="8bit")
    error = (lm.capture(IDS, hooks=[POINT])[POINT].float() - x).norm() / x.norm()
    assert 0 < error < 0.05
    assert lm.quantization == "8bit"


DEMO_POINT = "blocks.2.hook_resid_post"


def split() -> list[list[float]]:
    """What each rank of a tensor-parallel model sees."""
    import torch.distributed

    lm = LanguageModel.load(str(MODEL_PATH), device="cpu", tensor_parallel=True)
    weight: Any = lm.blocks[0].get_parameter("mlp.up_proj.weight")
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    assert local.shape[0] * 2 == lm.config.intermediate_size
    states = lm.capture(IDS, hooks=[DEMO_POINT])[DEMO_POINT]
    with lm.edit(DEMO_POINT, lambda h, now: h + 1):
        logits = lm.logits(IDS)
    torch.distributed.destroy_process_group()
    return [states.flatten().tolist(), logits.flatten().tolist()]


def test_every_rank_of_a_split_model_sees_the_states_of_one_process() -> None:
    plain = LanguageModel.load(str(MODEL_PATH), device="cpu")
    states = plain.capture(IDS, hooks=[DEMO_POINT])[DEMO_POINT].flatten()
    with plain.edit(DEMO_POINT, lambda h, now: h + 1):
        logits = plain.logits(IDS).flatten()
    for ok, answer in answers(start_ranks(2, split)):
        assert ok, answer
        torch.testing.assert_close(torch.tensor(answer[0]), states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(answer[1]), logits, atol=1e-4, rtol=1e-4)


CACHING: dict[str, Any] = {
    "model": str(MODEL_PATH), "device": "cpu", "hook": DEMO_POINT, "tokens": 700, "shard_rows": 150, "batch_size": 2,
    "context_length": 64, "dtype": "float32", "timeout_seconds": 20.0,
}  # fmt: skip


def cache_split(out: str, options: dict[str, Any], fail_after: int) -> Any:
    """A rank that caches with a tensor-parallel model; the first one's disk fails after so many batches."""
    from steersman.demo import texts
    from steersman.parallel import rank_and_world_size
    from steersman.train.store.writer import StoreWriter

    append, done = StoreWriter.append, []

    def failing(self: StoreWriter, *args: Any, **named: Any) -> None:
        if len(done) == fail_after and rank_and_world_size()[0] == 0:
            raise SteersmanError("the disk is full")
        done.append(append(self, *args, **named))

    StoreWriter.append = failing
    try:
        store = cache_activations(texts=texts(40), out=out, tensor_parallel=True, **{**CACHING, **options})
    except SteersmanError as error:
        return type(error).__name__, str(error)
    return store.n_rows, len(done)


def test_a_split_model_caches_what_one_process_caches(tmp_path: Path) -> None:
    from steersman.demo import texts

    one = cache_activations(texts=texts(40), out=str(tmp_path / "one"), **CACHING)
    out = str(tmp_path / "acts")
    cut = [answer for ok, answer in answers(start_ranks(2, cache_split, out, {}, 3)) if ok]
    assert cut[0] == ("SteersmanError", "the disk is full")
    assert cut[1][0] == "LostRankError"
    other = [answer for ok, answer in answers(start_ranks(2, cache_split, out, {"shard_rows": 99}, -1)) if ok]
    assert [name for name, _ in other] == ["SteersmanError"] * 2
    assert all("shard_rows" in message for _, message in other)
    (rows, written), (same, _) = [answer for _, answer in answers(start_ranks(2, cache_split, out, {}, -1))]
    assert rows == same == one.n_rows == 700
    assert 0 < written < 6  # it went on from the shards that were there
    store = ActivationStore.open(out)
    x, expected = (s.activations(torch.arange(700)) for s in (store, one))
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(store.tokens(0, 700).token_ids, one.tokens(0, 700).token_ids)
    again = [answer for _, answer in answers(start_ranks(2, cache_split, out, {}, -1))]
    assert again == [(700, 0), (700, 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": True}, "start them with torchrun"),
        ({"tensor_parallel": True, "quantization": "8bit"}, "leave out device_map and quantization"),
        ({"device_map": "auto"}, r'device_map needs accelerate, which is not installed: pip install "steersman'),
        ({"quantization": "3bit"}, "unknown quantization '3bit': use one of 8bit, 4bit"),
        ({"quantization": "4bit"}, "quantization needs bitsandbytes, which is not installed"),
    ],
)
def test_placements_that_cannot_be(
    folder: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SteersmanError, match=message) as error:
        LanguageModel.load(str(folder), device="cpu", **options)
    assert "\n" not in str(error.value)


def test_what_names_no_model() -> None:
    for wrong in (None, 7, ["a"]):
        with pytest.raises(SteersmanError, match="a model is named by a folder or a hub id, got"):
            LanguageModel.load(wrong)  # pyright: ignore[reportArgumentType]
    for wrong in ("text", None, torch.nn.Linear(2, 2)):
        with pytest.raises(SteersmanError, match="a LanguageModel wraps a transformers model, this is a"):
            LanguageModel(wrong)  # pyright: ignore[reportArgumentType]


def test_models_of_pictures_and_sound_are_refused() -> None:
    import transformers

    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    for kind in ("ViT", "CLIPVision"):
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**vision))
        with pytest.raises(SteersmanError, match=f"{kind}Model reads pixel_values, not text"):
            LanguageModel(model)
    t5 = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1, vocab_size=9)
    with pytest.raises(SteersmanError, match="encoder-decoder"):
        LanguageModel(transformers.T5ForConditionalGeneration(t5))


def test_a_model_in_the_hubs_cache_has_the_hubs_name(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "models--google--gemma-2-2b" / "snapshots" / ("c5" * 20)
    place.parent.mkdir(parents=True)
    folder.rename(place)
    lm = LanguageModel.load(place, device="cpu")
    assert lm.name == LanguageModel(lm.model).name == "google/gemma-2-2b"


def damaged(folder: Path, name: str, **changes: Any) -> None:
    whole = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**whole, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**6}, "config.json: num_hidden_layers is more than 2,000: 1000000"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers is less than 1: 0"),
        ({"hidden_size": 2**60}, "config.json: hidden_size is more than 2,147,483,648"),
        ({"num_hidden_layers": 7}, "would compute with random ones"),
        ({"attention_bias": "yes"}, "cannot load a model from"),
        ({"vocab_size": {"a": 1}}, "cannot load a model from"),
    ],
)
def test_configurations_that_no_model_has(folder: Path, changes: dict[str, Any], message: str) -> None:
    damaged(folder, "config.json", **changes)
    with pytest.raises(SteersmanError, match=message) as error:
        LanguageModel.load(folder, device="cpu")
    assert "\n" not in str(error.value)


def test_files_that_are_none_and_tokenizers_that_cannot_be_read(folder: Path) -> None:
    tokenizer = folder / "tokenizer.json"
    whole = tokenizer.read_text()
    for wrong in ("{", whole.replace("WordLevel", "WordLeven"), "[" * 100_000):
        tokenizer.write_text(wrong)
        with pytest.raises(SteersmanError, match="cannot load a model from") as error:
            LanguageModel.load(folder, device="cpu")
        assert "\n" not in str(error.value)
    tokenizer.unlink()
    os.mkfifo(tokenizer)
    with pytest.raises(SteersmanError, match=r"tokenizer\.json is no regular file"):
        LanguageModel.load(folder, device="cpu")


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.lm.load.reachable", lambda: False)
    with pytest.raises(SteersmanError, match="the hub cannot be reached, or is switched off") as error:
        LanguageModel.load("nobody/has-this-model")
    assert "\n" not in str(error.value)
