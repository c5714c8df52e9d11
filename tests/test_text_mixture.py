"""Texts mixed by weight: the shares are those of the tokens, at every place, wherever reading starts."""

import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.ranks import as_rank
from support.stores import HOOK, digests

from steersman import LanguageModel, cache_activations, stream_activations
from steersman.errors import LostRankError, SteersmanError
from steersman.text import Mixture, open_text
from steersman.text_mixture import named_texts

pytestmark = pytest.mark.usefixtures("no_progress")
OPTIONS: dict[str, Any] = {"hook": HOOK, "context_length": 16, "batch_size": 4, "shard_rows": 100, "tokens": 600}
WEIGHTS = [0.6, 0.3, 0.1]


@cache
def sources() -> list[list[str]]:
    """Three texts whose documents are long, middling and short; each says whose it is, and is no other's."""
    rng = np.random.default_rng(0)
    return [
        [
            " ".join([f"w{4 + i}", f"w{n}", *(f"w{w}" for w in rng.integers(4, 61, rng.integers(longest)))])
            for n in range(60)
        ]
        for i, longest in enumerate((40, 12, 3))
    ]


def mixture(**settings: Any) -> Mixture:
    return Mixture(list(zip(sources(), WEIGHTS)), **settings)


def owner(document: str) -> int:
    return int(document.split()[0][1:]) - 4


def test_each_text_has_its_share_at_every_place() -> None:
    documents = list(open_text(mixture()).documents())
    given, longest = np.zeros(3), max(map(len, documents))
    for document in documents:
        given[owner(document)] += len(document)
        # Fair queueing: no text is ahead of or behind its share by more than about a document.
        assert (np.abs(given - given.sum() * np.array(WEIGHTS)) <= longest).all()
    for i, texts in enumerate(sources()):  # in the order of each text
        mine = [document for document in documents if owner(document) == i]
        assert mine == texts[: len(mine)]


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
def test_reading_starts_at_any_document(strategy: Any) -> None:
    documents = list(open_text(mixture(stopping_strategy=strategy)).documents())
    text = open_text(mixture(stopping_strategy=strategy))
    for start in (0, 7, len(documents) - 1, 3, len(documents)):  # places that are known and that are not yet
        assert list(text.documents(start)) == documents[start:]


def test_where_a_mixture_ends() -> None:
    short, long = ["aa", "bb"], [f"{i:02d}" for i in range(9)]
    first = open_text(Mixture([(short, 1), (long, 1)]))
    assert list(first.documents()) == ["aa", "00", "bb", "01"]  # `short` is due again, and has ended
    every = open_text(Mixture([(short, 1), (long, 1)], stopping_strategy="all_exhausted"))
    assert list(every.documents()) == [x for pair in zip(short * 5, long) for x in pair] + ["bb"]
    endless = open_text(Mixture([(lambda n: f"{n:02d}", 1), (long, 2)]))
    assert len(list(endless.documents())) == 9 + 5
    assert endless.n_characters() == 27
    assert open_text(Mixture([(lambda n: "x", 1), (long, 2)], stopping_strategy="all_exhausted")).n_characters() is None


def test_weights_are_shares_of_the_tokens_in_store_and_stream(lm: LanguageModel, tmp_path: Path) -> None:
    store = cache_activations(lm, mixture(), out=str(tmp_path / "acts"), **OPTIONS)
    info = store.tokens(0, store.n_rows)
    ids = [int(token) for token in info.token_ids]
    known = {lm.token_ids(f"w{4 + i}")[0]: i for i in range(3)}
    starts = np.flatnonzero(np.diff(info.doc_ids, prepend=-1))
    shares = np.zeros(3)
    for start, end in zip(starts, [*starts[1:], len(ids)]):
        shares[known[ids[start]]] += end - start
    np.testing.assert_allclose(shares / 600, WEIGHTS, atol=42 / 600)
    assert "0.6 of (list of 60" in json.loads((tmp_path / "acts" / "manifest.json").read_text())["config"]["text"]
    stream = stream_activations(
        lm, mixture(), hook=HOOK, context_length=16, batch_size=4, buffer_rows=64, heldout_rows=0
    )
    rows = [int(t) for batch in islice(stream.batches(16, shuffle=False), 20) for t in batch.token_ids]
    assert rows == ids[:320]
    later = next(iter(stream.batches(16, shuffle=False, start=10)))
    assert later.token_ids.tolist() == ids[160:176]


def test_resuming_and_several_ranks_give_the_same_store(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_activations(lm, mixture(), out=str(tmp_path / "whole"), **OPTIONS)
    cache_activations(lm, mixture(), out=str(tmp_path / "grown"), **{**OPTIONS, "tokens": 250})
    cache_activations(lm, mixture(), out=str(tmp_path / "grown"), **OPTIONS, extend=True)
    assert digests(tmp_path / "grown") == digests(tmp_path / "whole")
    with as_rank(1, 2, monkeypatch), pytest.raises(LostRankError, match="start rank 0"):
        cache_activations(lm, mixture(), out=str(tmp_path / "ranks"), **OPTIONS, timeout_seconds=0.2)
    with as_rank(0, 2, monkeypatch):
        cache_activations(lm, mixture(), out=str(tmp_path / "ranks"), **OPTIONS)
    assert digests(tmp_path / "ranks") == digests(tmp_path / "whole")
    other = Mixture(list(zip(sources(), (0.5, 0.3, 0.2))))
    with pytest.raises(SteersmanError, match="the text changed"):
        cache_activations(lm, other, out=str(tmp_path / "whole"), **OPTIONS)


def test_names_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "run=3", "b=0.5"):
        Path(name).write_text("words\n")
    both = named_texts(["a.txt=7", "run=3=3e-1"])
    assert isinstance(both, Mixture)
    assert both.parts == [("a.txt", 7.0), ("run=3", 0.3)]
    assert named_texts("run=3") == "run=3"
    assert named_texts(["b=0.5"]) == "b=0.5"
    assert named_texts(["a.txt=0.5"]) == "a.txt"
    assert named_texts(()) is None
    assert named_texts("someone/corpus:en:x=y") == "someone/corpus:en:x=y"
    with pytest.raises(SteersmanError, match=r"text 'run=3' has no weight"):
        named_texts(["run=3", "a.txt=1"])
    with pytest.raises(SteersmanError, match=r"the weight of 'a.txt' is 'much', which is no number"):
        named_texts(["a.txt=much", "run=3=1"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": -1, "b": 2}, "the weight of 'a' is -1; it must be above 0"),
        ({"a": 0, "b": 0}, "the weight of 'a' is 0; it must be above 0"),
        ({"a": float("nan")}, "the weight of 'a' is nan"),
        ({"a": "half", "b": 1}, "the weight of 'a' is str, not a number"),
        ({"a": True}, "the weight of 'a' is bool, not a number"),
        ({}, "a mixture of no texts"),
        (["x", "y"], r"a mixture is of pairs \(text, weight\), not of str"),
        ([(["x"], 1), (["x"], 2)], "in the mixture twice"),
        ([(["x"], 1e308), (["y"], 1e308)], "add up to infinity"),
    ],
)
def test_weights_that_cannot_be(parts: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        open_text(parts if isinstance(parts, dict) else Mixture(parts))


def test_texts_without_their_share() -> None:
    with pytest.raises(SteersmanError, match=r"stopping_strategy 'sometime' is not first_exhausted or all_exhausted"):
        Mixture([("a", 1)], stopping_strategy="sometime")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SteersmanError, match="has no text for its share"):
        list(open_text(Mixture([(["", ""], 1), (["x"], 1)], stopping_strategy="all_exhausted")).documents())
