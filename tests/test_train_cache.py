"""Caching: the rows are the model's, an interruption changes no byte, and what goes wrong is said in one line."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.power_cut import PowerCut, power_cut_after
from support.stores import HOOK, digests, word_documents

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.train import ActivationStore, CacheConfig, StreamConfig, cache_activations
from steersman.train.capture.capture import Capture, CaptureConfig
from steersman.train.store.shards import ShardWriter

DOCUMENTS = word_documents(60)
OPTIONS: dict[str, Any] = {"hook": HOOK, "context_length": 16, "batch_size": 4, "tokens": None, "shard_rows": 300}
pytestmark = pytest.mark.usefixtures("no_progress")


def cached(lm: LanguageModel, out: Path, texts: Any = None, **options: Any) -> ActivationStore:
    return cache_activations(lm, DOCUMENTS if texts is None else texts, out=str(out), **{**OPTIONS, **options})


# What is cached


def test_rows_are_what_the_model_computes_for_those_tokens(lm: LanguageModel, tmp_path: Path) -> None:
    hooks = ("blocks.0.hook_mlp_out", HOOK)
    store = cached(lm, tmp_path / "acts", hook=hooks, packing=False, dtype="float32", context_length=32)
    assert (store.hook_names, store.model_name, store.complete) == (list(hooks), "llama", True)
    info = store.tokens(0, store.n_rows)
    for number in (0, 7, 31, 59):
        ids = [0, *lm.token_ids(DOCUMENTS[number])][:32]
        rows = torch.nonzero(info.doc_ids == number).flatten()
        assert info.token_ids[rows].tolist() == ids[1:]  # all but BOS
        assert info.positions[rows].tolist() == list(range(1, len(ids)))
        for hook, expected in lm.capture(torch.tensor([ids]), hooks=hooks).items():
            torch.testing.assert_close(store.activations(rows, hook), expected[0, 1:], rtol=1e-4, atol=1e-5)


def test_packed_rows_are_all_tokens_of_the_text_in_order(lm: LanguageModel, tmp_path: Path) -> None:
    store = cached(lm, tmp_path / "acts")
    info = store.tokens(0, store.n_rows)
    expected = [(number, token) for number, text in enumerate(DOCUMENTS) for token in lm.token_ids(text)]
    assert list(zip(info.doc_ids.tolist(), info.token_ids.tolist())) == expected
    assert [shard.rows for shard in store.manifest.shards][:-1] == [300] * (len(store.manifest.shards) - 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_type_on_disk_is_the_one_asked_for(lm: LanguageModel, tmp_path: Path, dtype: Any) -> None:
    store = cached(lm, tmp_path / dtype, dtype=dtype, tokens=100)
    exact = cached(lm, tmp_path / "exact", dtype="float32", tokens=100)
    rows = torch.arange(100)
    assert store.dtype == getattr(torch, dtype)
    assert torch.equal(store.activations(rows), exact.activations(rows).to(store.dtype))


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({}, {0}),
        ({"exclude_bos": False}, set()),
        ({"exclude_eos": True}, {0, 1}),
        ({"exclude_tokens": (7, 9)}, {0, 7, 9}),
    ],
)
@pytest.mark.parametrize("packing", [True, False])
def test_tokens_left_out(lm: LanguageModel, tmp_path: Path, options: Any, absent: set[int], packing: bool) -> None:
    texts = [f"{text} </s>" for text in DOCUMENTS]
    store = cached(lm, tmp_path / "acts", texts, packing=packing, **options)
    tokens = set(store.tokens(0, store.n_rows).token_ids.tolist())
    assert {0, 1, 7, 9} - tokens == absent
    assert 3 not in tokens  # padding never is a row


def test_the_number_of_tokens_is_exact(lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cached(lm, tmp_path / "a", tokens=300).n_rows == 300
    assert cached(lm, tmp_path / "b", tokens=301).n_rows == 301
    assert "text ended" not in caplog.text
    whole = cached(lm, tmp_path / "c", tokens=10_000)
    assert whole.n_rows == sum(len(lm.token_ids(text)) for text in DOCUMENTS)
    assert f"ended after {whole.n_rows} of the 10000" in caplog.text


def test_an_encoder_is_cached_too(tmp_path: Path) -> None:
    from support.tiny_models import build, word_tokenizer

    lm = LanguageModel(build("bert").model, word_tokenizer(cls_token="<s>", pad_token="<pad>"), name="bert")
    store = cached(lm, tmp_path / "acts", packing=False)
    assert store.n_rows == sum(min(len(lm.token_ids(text)), 15) for text in DOCUMENTS)


# Interrupting and resuming


KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from support.stores import word_documents
from support.tiny_models import with_text
from steersman.train import cache_activations

lm, texts = with_text("llama"), word_documents(600, seed=3)

def start(out):
    if child := os.fork():
        return child
    try:
        cache_activations(lm, texts, hook=("blocks.0.hook_mlp_out", "model.layers.2"), out=out, tokens=12_001,
                          context_length=16, batch_size=4, shard_rows=500)
    finally:
        os._exit(0)

os.waitpid(start(sys.argv[1]), 0)
for shard in (2, 3, 9, 15):  # killed when so many shards are there
    child = start(sys.argv[2])
    while not Path(sys.argv[2], "rows", f"{shard:05d}.safetensors").exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had ended before"
    assert b'"complete": false' in Path(sys.argv[2], "manifest.json").read_bytes()
os.waitpid(start(sys.argv[2]), 0)
"""


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", KILLER, str(whole), str(killed)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert ActivationStore.open(killed).n_rows == 12_001
    assert len(digests(whole)) == 3 * 25 + 2
    assert digests(whole) == digests(killed)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("appends", [1, 2, 9, 14])
def test_an_error_anywhere_leaves_whole_shards_and_can_be_resumed_from(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appends: int, packing: bool
) -> None:
    texts = [*DOCUMENTS, "", "w5 w6"]
    whole = cached(lm, tmp_path / "whole", texts, shard_rows=110, packing=packing)
    original, calls = ShardWriter.append, 0

    def failing(self: ShardWriter, x: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls > appends:
            raise RuntimeError("power cut")
        original(self, x)

    monkeypatch.setattr(ShardWriter, "append", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        cached(lm, tmp_path / "acts", texts, shard_rows=110, packing=packing)
    monkeypatch.undo()
    assert list((tmp_path / "acts").rglob("*.tmp")) == []
    cached(lm, tmp_path / "acts", texts, shard_rows=110, packing=packing)
    assert digests(whole.path) == digests(tmp_path / "acts")


def test_a_power_cut_at_any_moment_loses_at_most_a_shard(lm: LanguageModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shard_rows": 110, "tokens": 250}
    whole = cached(lm, tmp_path / "whole", **options)
    n, ended = 0, False
    while not ended:
        out = tmp_path / f"acts{n}"
        with suppress(PowerCut), power_cut_after(n) as changes:
            cached(lm, out, **options)
        again = cached(lm, out, **options)
        assert digests(again.path) == digests(whole.path), f"cut after {changes[-1:]}, change {n}"
        ended = len(changes) < n
        n += 1
    assert n > 20


def test_files_that_an_interruption_left_are_removed(lm: LanguageModel, tmp_path: Path) -> None:
    whole = cached(lm, tmp_path / "whole", tokens=900)
    store = cached(lm, tmp_path / "acts", tokens=900)
    manifest = store.path / "manifest.json"
    # As if the run had been killed after shard 1: the manifest of that moment, and files that it does not name.
    from dataclasses import replace

    replace(store.manifest, complete=False, statistics=None, shards=store.manifest.shards[:2]).save(store.path)
    (store.path / HOOK / ".00003.safetensors.tmp").write_bytes(b"part of a shard")
    assert b'"complete": false' in manifest.read_bytes()
    cached(lm, tmp_path / "acts", tokens=900)
    assert digests(whole.path) == digests(store.path)


def test_a_finished_store_is_returned_at_once(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached(lm, tmp_path / "acts", tokens=200)

    def no_pass(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(LanguageModel, "capture", no_pass)
    assert cached(lm, tmp_path / "acts", tokens=200).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokens": 300}, "tokens was 200, now 300"),
        ({"hook": "blocks.0.hook_resid_post"}, "hooks"),
        ({"dtype": "float32"}, "dtype was 'bfloat16', now 'float32'"),
        ({"packing": False, "context_length": 12}, "context_length was 16, now 12; packing was True"),
        ({"batch_size": 8}, "batch_size"),
        ({"exclude_tokens": (5,)}, "excluded_tokens"),
        ({"shard_rows": 64}, "shard_rows"),
    ],
)
def test_a_store_of_another_configuration_is_refused(
    lm: LanguageModel, tmp_path: Path, options: Any, named: str
) -> None:
    before = cached(lm, tmp_path / "acts", tokens=200)
    with pytest.raises(SteersmanError, match=f"another configuration: {named}"):
        cached(lm, tmp_path / "acts", **{"tokens": 200, **options})
    assert ActivationStore.open(tmp_path / "acts").fingerprint == before.fingerprint


# What is not finite


class _Broken(LanguageModel):
    """Gives NaN for one token."""

    def capture(self, input_ids: torch.Tensor, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        found = super().capture(input_ids, *args, **options)
        return {hook: x.masked_fill((input_ids == 17)[..., None], float("nan")) for hook, x in found.items()}


@pytest.fixture(scope="module")
def broken(lm: LanguageModel) -> LanguageModel:
    return _Broken(lm.model, lm.tokenizer, name="llama")


def test_an_activation_that_is_not_finite_names_document_and_token(broken: LanguageModel, tmp_path: Path) -> None:
    texts = ["w5 w6", "w7 w8 w17 w9"]
    with pytest.raises(SteersmanError, match=r"token 17 'w17' at position 6 of document 1; .*on_nonfinite='skip'"):
        cached(broken, tmp_path / "acts", texts)
    assert not (tmp_path / "acts").exists()
    assert cached(broken, tmp_path / "acts", texts, on_nonfinite="skip").n_rows == 5


def test_skipped_rows_are_counted_and_replaced_by_later_ones(broken: LanguageModel, tmp_path: Path) -> None:
    everything = [token for text in DOCUMENTS for token in broken.token_ids(text)]
    good = [token for token in everything if token != 17]
    store = cached(broken, tmp_path / "acts", tokens=1001, on_nonfinite="skip", shard_rows=100)
    assert store.tokens(0, 1001).token_ids.tolist() == good[:1001]
    last = [place for place, token in enumerate(everything) if token != 17][1000]
    assert store.manifest.n_skipped == everything[:last].count(17)


def test_skipping_and_resuming_gives_the_same_bytes(
    broken: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cached(broken, tmp_path / "whole", on_nonfinite="skip", shard_rows=97)
    original, calls = ShardWriter.append, 0

    def failing(self: ShardWriter, x: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise RuntimeError("power cut")
        original(self, x)

    monkeypatch.setattr(ShardWriter, "append", failing)
    for _ in range(100):
        try:
            cached(broken, tmp_path / "acts", on_nonfinite="skip", shard_rows=97)
            break
        except RuntimeError:
            continue
    assert calls > 20
    assert digests(whole.path) == digests(tmp_path / "acts")


# What is asked for wrongly


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook": "blocks.1.hook_resid_pst"}, "blocks.1.hook_resid_post"),
        ({"hook": (HOOK, "model.layers.1")}, "different hook points"),
        ({"hook": ()}, "hook must name"),
        ({"context_length": 33}, "context_length 33 is not between 2 and the 32 positions"),
        ({"context_length": 1}, "context_length 1"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"tokens": 0}, "tokens 0"),
        ({"shard_rows": 0}, "shard_rows 0"),
        ({"activation_dtype": "int8"}, "activation_dtype is 'int8', it should be one of"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore', it should be one of error, skip"),
        ({"token": 5}, "unknown setting 'token'; near it: tokens"),
        ({"texts": []}, "list of texts is empty"),
        ({"texts": ["", ""]}, "no document has any text"),
        ({"texts": "/nowhere.jsonl"}, "no such file"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    lm: LanguageModel, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteersmanError, match=message):
        cached(lm, tmp_path / "acts", **options)
    assert not (tmp_path / "acts").exists()


def test_what_is_missing_is_named(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="needs hook and out"):
        cache_activations(lm, DOCUMENTS)
    with pytest.raises(SteersmanError, match="no text given"):
        cache_activations(lm, hook=HOOK, out=str(tmp_path / "a"))
    with pytest.raises(SteersmanError, match="no model given"):
        cache_activations(None, DOCUMENTS, CacheConfig(hook=HOOK, out=str(tmp_path / "a")))
    with pytest.raises(SteersmanError, match="without a tokenizer"):
        cached(LanguageModel(lm.model), tmp_path / "a")


def test_model_and_text_by_name(tmp_path: Path, lm: LanguageModel) -> None:
    lm.model.save_pretrained(tmp_path / "llama")
    lm.tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    config = CacheConfig(
        hook="model.layers.1", out=str(tmp_path / "acts"), model=str(tmp_path / "llama"), device="cpu",
        text=str(tmp_path / "text.txt"), context_length=16, batch_size=4, tokens=500,
    )  # fmt: skip
    store = cache_activations(config=config)
    assert (store.hook_name, store.model_name, store.n_rows) == (HOOK, "llama", 500)
    assert torch.equal(store.activations(torch.arange(500)), cached(lm, tmp_path / "b").activations(torch.arange(500)))


def test_every_field_has_a_sentence() -> None:
    import ast
    import inspect
    import textwrap

    sources = [textwrap.dedent(inspect.getsource(kind)) for kind in (CaptureConfig, CacheConfig, StreamConfig)]
    body = [node for source in sources for node in ast.parse(source).body[0].body]  # pyright: ignore[reportAttributeAccessIssue]
    for number, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            following = body[number + 1]
            assert isinstance(following, ast.Expr), ast.unparse(node)
            assert isinstance(following.value, ast.Constant), ast.unparse(node)
    assert len(fields(CacheConfig)) > 15


# The disk


def test_too_little_disk_is_found_before_starting(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 0, 20_000))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(SteersmanError, match=r"needs 48 kB more and the disk has 20 kB free"):
        cached(lm, tmp_path / "acts", tokens=1000)
    assert not (tmp_path / "acts").exists()
    assert cached(lm, tmp_path / "acts", tokens=400).n_rows == 400


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_leaves_whole_shards_and_can_be_resumed(
    lm: LanguageModel, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steersman.train.capture.cache as cache

    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    monkeypatch.setattr(cache, "_check_disk", lambda *_: None)  # as if another program took the space meanwhile
    with pytest.raises(SteersmanError, match=r"no space left on the disk; \d finished shards are intact: free space"):
        cached(lm, small_disk / "acts", tokens=1500)
    monkeypatch.undo()
    monkeypatch.setenv("STEERSMAN_PROGRESS", "0")
    assert list(small_disk.rglob("*.tmp")) == []
    partial = ActivationStore.open(small_disk / "acts", allow_partial=True, verify=True)
    assert partial.n_rows == 300 * len(partial.manifest.shards) > 0
    ballast.unlink()
    cached(lm, small_disk / "acts", tokens=1500)
    assert digests(small_disk / "acts") == digests(cached(lm, tmp_path / "whole", tokens=1500).path)


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"), (errno.EIO, "input/output")],
)
def test_disk_errors_become_one_line(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def failing(self: ShardWriter, x: torch.Tensor) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(ShardWriter, "append", failing)
    with pytest.raises(SteersmanError, match=message) as caught:
        cached(lm, tmp_path / "acts")
    assert "\n" not in str(caught.value)


# The rows themselves


def test_restarting_at_a_cursor_gives_the_same_rows(lm: LanguageModel) -> None:
    capture = Capture.open(lm, DOCUMENTS, CaptureConfig(hook=HOOK, context_length=16, batch_size=4))
    rows = list(capture.rows())
    for number in (1, 5, len(rows) - 1):
        again = list(capture.rows(rows[number].cursor))
        assert len(again) == len(rows) - number
        for one, other in zip(rows[number:], again):
            assert torch.equal(one.activations[HOOK], other.activations[HOOK])
            np.testing.assert_array_equal(one.doc_ids, other.doc_ids)
