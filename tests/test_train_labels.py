"""Labels beside the rows of a store: where they come from, and that nothing moves them from their tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.stores import HOOK, digests, word_documents

from steersman.errors import SteersmanError
from steersman.labels import LabelledText
from steersman.lm import LanguageModel
from steersman.text import open_text
from steersman.train import ActivationStore, HookView, cache_activations
from steersman.train.store.shards import ShardWriter

WORDS = word_documents(40, seed=5, longest=30)
LABELS: list[Any] = [(1, 0, -1, None)[i % 4] for i in range(40)]
DOCUMENTS = [{"text": text, "label": label} for text, label in zip(WORDS, LABELS)]
OPTIONS: dict[str, Any] = {"hook": HOOK, "context_length": 16, "batch_size": 4, "tokens": None, "shard_rows": 100}
pytestmark = pytest.mark.usefixtures("no_progress")


def cached(lm: LanguageModel, out: Path, texts: Any = None, **options: Any) -> ActivationStore:
    settings = {**OPTIONS, "label_column": "label", **options}
    return cache_activations(lm, DOCUMENTS if texts is None else texts, out=str(out), **settings)


def of_documents(store: ActivationStore, labels: list[Any] = LABELS) -> bool:
    """Whether every row has its document's label."""
    info = store.tokens(0, store.n_rows)
    expected = torch.tensor([-1 if label is None else label for label in labels])[info.doc_ids]
    return info.labels is not None and bool((info.labels == expected).all())


@pytest.mark.parametrize("packing", [True, False])
def test_every_row_has_its_documents_label(lm: LanguageModel, tmp_path: Path, packing: bool) -> None:
    store = cached(lm, tmp_path / "acts", packing=packing)
    assert store.has_labels
    assert of_documents(store)
    assert len(store.manifest.shards) > 3
    known = store.tokens(0, store.n_rows).labels
    assert known is not None
    assert store.n_labelled("all") == int((known >= 0).sum())
    plain = cache_activations(lm, WORDS, out=str(tmp_path / "plain"), packing=packing, **OPTIONS)
    assert not plain.has_labels
    assert plain.tokens(0, 3).labels is None
    assert torch.equal(plain.activations(torch.arange(50)), store.activations(torch.arange(50)))
    assert plain.n_labelled() == 0


def test_shuffled_batches_and_views_carry_the_label_of_each_row(lm: LanguageModel, tmp_path: Path) -> None:
    store = cached(lm, tmp_path / "acts")
    for source in (store, HookView(store, HOOK)):
        seen = 0
        for batch in source.batches(64, split="all", seed=3, drop_last=False):
            expected = torch.tensor([-1 if LABELS[i] is None else LABELS[i] for i in batch.doc_ids.tolist()])
            assert batch.labels is not None
            assert torch.equal(batch.labels.long(), expected)
            seen += len(batch)
        assert seen == store.n_rows


def test_files_of_text_bring_labels(lm: LanguageModel, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": bool(i % 2)} if i else {"text": text}) for i, text in enumerate(WORDS)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    store = cached(lm, tmp_path / "acts", str(tmp_path / "texts.jsonl"))
    assert of_documents(store, [-1, *(i % 2 for i in range(1, 40))])
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": WORDS, "harm": LABELS}), tmp_path / "texts.parquet")
    found = list(open_text(tmp_path / "texts.parquet", label_column="harm").documents())
    assert [text.label for text in found if isinstance(text, LabelledText)] == [-1 if x is None else x for x in LABELS]


def test_labels_of_tokens(lm: LanguageModel, tmp_path: Path) -> None:
    texts = ["w5 w6 w7", "w8 " * 20, "w9 w10"]
    labels = [[1, 0, None], [i % 2 for i in range(20)], 1]
    store = cached(lm, tmp_path / "acts", [{"text": t, "label": y} for t, y in zip(texts, labels)])
    info = store.tokens(0, store.n_rows)
    assert info.labels is not None
    assert info.labels.tolist() == [1, 0, -1, *labels[1], 1, 1]
    with pytest.raises(SteersmanError, match=r"document 1 has 2 labels and 3 tokens \(without BOS\)"):
        cached(lm, tmp_path / "other", [{"text": "w5", "label": 1}, {"text": "w5 w6 w7", "label": [1, 0]}])


def test_an_interrupted_run_ends_with_the_same_bytes(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cached(lm, tmp_path / "whole")
    close, closed = ShardWriter.close, []

    def stopping(self: ShardWriter) -> Any:
        closed.append(self.path)
        if len(closed) == 3:
            raise KeyboardInterrupt
        return close(self)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", stopping)
        with pytest.raises(KeyboardInterrupt):
            cached(lm, tmp_path / "acts")
    part = ActivationStore.open(tmp_path / "acts", allow_partial=True)
    assert 0 < part.n_rows < whole.n_rows
    assert of_documents(part)
    assert cached(lm, tmp_path / "acts").fingerprint == whole.fingerprint
    assert digests(tmp_path / "acts") == digests(tmp_path / "whole")


def _cache_on_a_rank(out: str) -> str:
    from support.tiny_models import with_text

    return cached(with_text("llama"), Path(out)).fingerprint


def test_several_ranks_leave_the_bytes_of_one(lm: LanguageModel, tmp_path: Path) -> None:
    alone = cached(lm, tmp_path / "alone")
    assert run_ranks(2, _cache_on_a_rank, str(tmp_path / "acts")) == [alone.fingerprint] * 2
    assert of_documents(ActivationStore.open(tmp_path / "acts"))


def test_other_labels_are_another_text(lm: LanguageModel, tmp_path: Path) -> None:
    cached(lm, tmp_path / "acts")
    other = [{**document, "label": 1} for document in DOCUMENTS]
    with pytest.raises(SteersmanError, match="text"):
        cached(lm, tmp_path / "acts", other)
    with pytest.raises(SteersmanError, match="labels"):
        cache_activations(lm, WORDS, out=str(tmp_path / "acts"), **OPTIONS)


def test_a_damaged_label_is_found(lm: LanguageModel, tmp_path: Path) -> None:
    cached(lm, tmp_path / "acts")
    file = tmp_path / "acts" / "rows" / "00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # int8 comes last
    file.write_bytes(data)
    with pytest.raises(SteersmanError, match="00000"):
        ActivationStore.open(tmp_path / "acts")


def test_tensors_bring_labels_with_all_batches_or_with_none(tmp_path: Path) -> None:
    x, y = torch.randn(30, 4), np.arange(30) % 3 - 1
    batches = [{"x": x[:20], "labels": y[:20]}, {"x": x[20:], "labels": y[20:]}]
    store = ActivationStore.from_tensors(batches, tmp_path / "acts", HOOK, shard_rows=7)
    labels = store.row_info(torch.tensor([4, 29, 0])).labels
    assert labels is not None
    assert labels.tolist() == [0, 1, -1]
    assert ActivationStore.open(tmp_path / "acts").has_labels
    for bad, message in (
        ([batches[0], {"x": x}], "with all batches or with none"),
        ([{"x": x}, batches[0]], "with all batches or with none"),
        ([{"x": x, "labels": y + 1}], "must be 1, 0, or -1"),
        ([{"x": x, "labels": y[:3]}], "must be integers"),
    ):
        with pytest.raises(SteersmanError, match=message):
            ActivationStore.from_tensors(bad, tmp_path / "bad", HOOK)


@pytest.mark.parametrize(
    ("texts", "column", "message"),
    [
        (DOCUMENTS, "lable", "none of the first 100 documents has a 'lable'"),
        (WORDS, "label", "none of the first 100 documents"),
        ([{"text": "w5", "label": "yes"}], "label", "the label is 'yes'; it must be 1, 0, or -1"),
        ([{"text": "w5", "label": 0.5}], "label", "it must be 1, 0, or -1"),
        ([{"words": "w5", "label": 1}], "label", "has no 'text'"),
    ],
)
def test_bad_labels_are_refused_before_the_model_runs(
    lm: LanguageModel, tmp_path: Path, texts: Any, column: str, message: str
) -> None:
    with pytest.raises(SteersmanError, match=message):
        cached(lm, tmp_path / "acts", texts, label_column=column)
    assert not (tmp_path / "acts").exists()


def test_a_txt_file_has_no_labels(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("w5\nw6\n")
    with pytest.raises(SteersmanError, match=r"a \.txt file has no labels"):
        cached(lm, tmp_path / "acts", str(tmp_path / "texts.txt"))
