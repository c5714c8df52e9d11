"""The stream of activations: a store's rows and rules, without the store."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.stores import HOOK, word_documents

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.train import (
    ActivationStream,
    StreamConfig,
    TrainConfig,
    cache_activations,
    stream_activations,
    train_sae,
)
from steersman.train.store.batch import HooksSideBySide

DOCUMENTS = word_documents(250, shortest=0)
OPTIONS: dict[str, Any] = {
    "hook": "model.layers.1", "buffer_rows": 512, "heldout_rows": 300, "context_length": 16, "batch_size": 4,
    "dtype": "float32",
}  # fmt: skip


def stream_of(lm: LanguageModel, texts: Any = None, **options: Any) -> ActivationStream:
    return ActivationStream(lm, DOCUMENTS if texts is None else texts, **{**OPTIONS, **options})


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the forward passes made from now on."""
    made: list[int] = []
    original = LanguageModel.capture

    def counted(self: LanguageModel, input_ids: torch.Tensor, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        made.append(len(input_ids))
        return original(self, input_ids, *args, **options)

    monkeypatch.setattr(LanguageModel, "capture", counted)
    return made


def test_it_gives_the_rows_that_a_store_of_the_same_text_holds(lm: LanguageModel, tmp_path: Path) -> None:
    stream = stream_of(lm)
    batches = list(stream.batches(64, shuffle=False, drop_last=False))
    first = int(batches[0].doc_ids[0])
    store = cache_activations(
        lm, DOCUMENTS[first:], hook=HOOK, out=str(tmp_path / "acts"), tokens=None, context_length=16, batch_size=4,
        dtype="float32",
    )  # fmt: skip
    assert torch.equal(torch.cat([batch.x for batch in batches]), store.activations(torch.arange(store.n_rows)))
    info = store.tokens(0, store.n_rows)
    assert torch.equal(torch.cat([batch.token_ids for batch in batches]), info.token_ids)
    assert torch.equal(torch.cat([batch.positions for batch in batches]), info.positions)
    assert torch.equal(torch.cat([batch.doc_ids for batch in batches]), info.doc_ids + first)
    assert (stream.hook_name, stream.model_name, stream.d_in, stream.dtype) == (HOOK, "llama", 16, torch.float32)
    assert stream.n_batches(64, drop_last=False) == len(batches)


def test_several_hook_points_stand_side_by_side_and_come_from_one_pass(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks, texts = ("blocks.0.mlp.hook_post", HOOK), DOCUMENTS[:60]
    alone = [stream_of(lm, texts, hook=hook, buffer_rows=128) for hook in hooks]
    expected = [list(stream.batches(32, seed=2, start=1)) for stream in alone]
    made = passes(monkeypatch)
    stream = stream_of(lm, texts, hook=(hooks[0], "model.layers.1"), buffer_rows=128)
    found = list(stream.batches(32, seed=2, start=1))
    n_passes = len(made)
    for both, parts in zip(found, zip(*expected)):
        assert torch.equal(both.x, torch.cat([part.x for part in parts], dim=1))
        assert torch.equal(both.rows, parts[0].rows)
    made.clear()
    list(stream_of(lm, texts, buffer_rows=128).batches(32, seed=2, start=1))
    assert n_passes == len(made)
    assert isinstance(stream, HooksSideBySide)
    assert (stream.hooks, stream.hook_name, stream.d_in) == (hooks, "+".join(hooks), stream.width(hooks[0]) + 16)
    for hook, one in zip(hooks, alone):
        assert torch.equal(stream.stats(hook).mean, one.stats().mean)
    assert stream.stats().mean_squared_norm == sum(one.stats().mean_squared_norm for one in alone)
    assert stream.fingerprint not in {one.fingerprint for one in alone}
    with pytest.raises(SteersmanError, match="side by side, not model.layers.1 alone"):
        stream.batches(32, hook="model.layers.1")
    with pytest.raises(SteersmanError, match=r"gives .*, not blocks.0.hook_resid_post"):
        stream.stats("blocks.0.hook_resid_post")


def test_settings_come_from_a_configuration_with_overrides(lm: LanguageModel) -> None:
    config = StreamConfig(**{**OPTIONS, "buffer_rows": 600})
    assert stream_activations(lm, DOCUMENTS, config).fingerprint == stream_of(lm, buffer_rows=600).fingerprint
    assert stream_activations(lm, DOCUMENTS, config, buffer_rows=512).fingerprint == stream_of(lm).fingerprint
    with pytest.raises(SteersmanError, match="StreamConfig needs hook"):
        stream_activations(lm, DOCUMENTS)
    with pytest.raises(SteersmanError, match="no model given"):
        stream_activations(texts=DOCUMENTS, config=config)


def test_model_and_text_by_name(lm: LanguageModel, tmp_path: Path) -> None:
    lm.model.save_pretrained(tmp_path / "llama")
    lm.tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("\n".join(text for text in DOCUMENTS if text))
    config = StreamConfig(model=str(tmp_path / "llama"), text=str(tmp_path / "text.txt"), device="cpu", **OPTIONS)
    batches = zip(stream_activations(config=config).batches(64), stream_of(lm, [*filter(None, DOCUMENTS)]).batches(64))
    assert all(torch.equal(one.x, other.x) for one, other in batches)


def test_a_shuffled_epoch_holds_every_row_once_with_its_own_values(lm: LanguageModel) -> None:
    stream = stream_of(lm)
    rows = torch.cat([batch.x for batch in stream.batches(64, shuffle=False, drop_last=False)])
    seen = []
    for batch in stream.batches(64, seed=1, drop_last=False):
        assert torch.equal(batch.x, rows[batch.rows])
        seen.append(batch.rows)
    order = torch.cat(seen)
    assert torch.equal(order.sort().values, torch.arange(len(rows)))
    assert {len(part) for part in seen[:-1]} == {64}
    assert stream.n_batches(64) == len(rows) // 64
    # Rows next to each other in the text are some hundreds apart in the order, as the buffer holds 512.
    place = torch.empty(len(order)).index_copy(0, order, torch.arange(len(order)).float())
    assert place.diff().abs().mean() > 100


def test_the_order_follows_from_seed_and_epoch(lm: LanguageModel) -> None:
    def rows(**options: Any) -> list[int]:
        return torch.cat([batch.rows for batch in stream_of(lm).batches(64, **options)]).tolist()

    assert rows(seed=1, epoch=2) == rows(seed=1, epoch=2)
    assert rows(seed=1, epoch=2) != rows(seed=1, epoch=3)
    assert rows(seed=1, epoch=2) != rows(seed=2, epoch=2)


@pytest.mark.parametrize("on_nonfinite", ["error", "skip"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_starting_at_a_batch_equals_skipping_to_it(lm: LanguageModel, on_nonfinite: str, shuffle: bool) -> None:
    stream = stream_of(lm, on_nonfinite=on_nonfinite)
    whole = list(stream.batches(48, seed=4, shuffle=shuffle, drop_last=False))
    for start in (0, 1, 4, 5, 17, len(whole) - 12, len(whole) - 6, len(whole) - 1, len(whole), len(whole) + 9):
        later = list(stream_of(lm, on_nonfinite=on_nonfinite).batches(
            48, seed=4, shuffle=shuffle, drop_last=False, start=start
        ))  # fmt: skip
        assert len(later) == max(len(whole) - start, 0)
        for one, other in zip(whole[start:], later):
            assert torch.equal(one.rows, other.rows)
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.token_ids, other.token_ids)


def test_starting_late_runs_the_model_only_over_what_is_needed(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(lm, DOCUMENTS * 4)
    made = passes(monkeypatch)
    n_batches = sum(1 for _ in stream.batches(64))
    whole = len(made)
    made.clear()
    next(iter(stream.batches(64, start=n_batches - 20)))
    assert 0 < len(made) < whole / 6


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_shares_of_all_ranks_are_one_process_batches(lm: LanguageModel, world_size: int) -> None:
    whole = list(stream_of(lm).batches(64, seed=5))
    shares = [list(stream_of(lm).batches(64, seed=5, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([share[number].x for share in shares]), batch.x)


def test_held_out_rows_are_the_first_documents(lm: LanguageModel) -> None:
    stream = stream_of(lm)
    held = list(stream.batches(50, split="heldout", shuffle=False, drop_last=False))
    train = torch.cat([batch.doc_ids for batch in stream.batches(64)])
    documents = torch.cat([batch.doc_ids for batch in held])
    assert documents.max() < train.min()
    assert 300 <= len(documents) < 300 + 4 * 16
    assert stream.n_batches(50, split="heldout", drop_last=False) == len(held)
    mixed = torch.cat([batch.rows for batch in stream.batches(50, split="heldout", seed=1, drop_last=False)])
    assert not torch.equal(mixed, torch.arange(len(mixed)))
    assert torch.equal(mixed.sort().values, torch.arange(len(mixed)))


def test_a_short_text_holds_out_a_twentieth_at_most(lm: LanguageModel) -> None:
    stream = stream_of(lm, heldout_rows=100_000)
    total = sum(len(lm.token_ids(text)) for text in DOCUMENTS)
    held = sum(map(len, stream.batches(1, split="heldout")))
    assert 0.03 * total < held < 0.05 * total + 64


def test_endless_text_has_no_number_of_batches_unless_tokens_are_given(lm: LanguageModel) -> None:
    def document(number: int) -> str:
        return DOCUMENTS[number % len(DOCUMENTS)]

    endless = stream_of(lm, document)
    assert endless.n_batches(64) is None
    batches = endless.batches(64)
    assert sum(len(next(batches)) for _ in range(200)) == 200 * 64
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    limited = stream_of(lm, document, tokens=1000)
    assert limited.n_batches(64) == 15
    assert len(list(limited.batches(64))) == 15
    assert stream_of(lm, tokens=1000).n_batches(100) == 10


def test_statistics_are_of_the_first_buffer(lm: LanguageModel) -> None:
    stream = stream_of(lm)
    first = torch.cat([batch.x for batch in stream.batches(64, shuffle=False)])[:512]
    stats = stream.stats()
    assert stats.n_rows == 512
    torch.testing.assert_close(stats.mean, first.double().mean(0).float())
    assert stats.mean_norm == pytest.approx(first.norm(dim=1).mean().item(), rel=1e-5)


def test_the_fingerprint_changes_with_text_and_settings(lm: LanguageModel) -> None:
    mine = stream_of(lm).fingerprint
    assert mine == stream_of(lm, list(DOCUMENTS)).fingerprint
    others = [stream_of(lm, DOCUMENTS[:99]), stream_of(lm, buffer_rows=600), stream_of(lm, hook="model.layers.0")]
    assert len({mine, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook": "blocks.9.hook_resid_post"}, "3"),
        ({"buffer_rows": 1}, "buffer_rows"),
        ({"context_length": 64}, "context_length 64"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"texts": []}, "list of texts is empty"),
        ({"hook": ("model.layers.1", "blocks.1.hook_resid_post")}, "one or several different hook points"),
        ({"buffer_row": 600}, "unknown setting 'buffer_row'; near it: buffer_rows"),
    ],
)
def test_mistakes_are_found_at_once(lm: LanguageModel, options: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        stream_of(lm, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 300}, "less than two batches of 300"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 9, "world_size": 2}, "divide"),
        ({"batch_size": 8, "split": "all"}, "neither 'train' nor 'heldout'"),
        ({"batch_size": 8, "hook": "blocks.0.hook_resid_post"}, "gives blocks.1.hook_resid_post"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(lm: LanguageModel, options: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        stream_of(lm).batches(**options)


def test_text_that_ends_within_the_held_out_rows_is_refused(lm: LanguageModel) -> None:
    class Once:
        """One document whose length nobody knows beforehand."""

        name = "one document"

        def identity(self) -> str:
            return "once"

        def documents(self, start: int = 0) -> Any:
            return iter(DOCUMENTS[1:2][start:])

        def n_characters(self) -> None:
            return None

    with pytest.raises(SteersmanError, match="no text is left to train on"):
        next(iter(stream_of(lm, Once()).batches(8)))


class _Broken(LanguageModel):
    """Gives NaN for one token."""

    def capture(self, input_ids: torch.Tensor, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        found = super().capture(input_ids, *args, **options)
        return {hook: x.masked_fill((input_ids == 17)[..., None], float("nan")) for hook, x in found.items()}


def test_rows_that_are_not_finite(lm: LanguageModel) -> None:
    broken = _Broken(lm.model, lm.tokenizer, name="llama")
    with pytest.raises(SteersmanError, match=r"token 17 'w17' at position \d+ of document \d+"):
        list(stream_of(broken).batches(64))
    skipping = stream_of(broken, on_nonfinite="skip")
    tokens = torch.cat([batch.token_ids for batch in skipping.batches(64)])
    assert 17 not in tokens
    assert 18 in tokens


def test_a_run_goes_on_with_the_same_text_and_model_alone(lm: LanguageModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(DOCUMENTS))
    config = TrainConfig(d_sae=32, k=2, batch_size=64, tokens=640, device="cpu")

    def train(model: LanguageModel, path: Path) -> None:
        train_sae(stream_of(model, str(path)), config, tmp_path / "run")

    train(lm, text)
    moved = text.rename(tmp_path / "another name.txt")
    train(LanguageModel(lm.model, lm.tokenizer, name="another name"), moved)  # finished: returned
    weight = lm.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[5, 3] += 1
        try:
            with pytest.raises(SteersmanError, match="trained on other data: another model"):
                train(lm, moved)
        finally:
            weight[5, 3] -= 1
    moved.write_text("\n".join([" ".join(reversed(DOCUMENTS[0].split())), *DOCUMENTS[1:]]))
    with pytest.raises(SteersmanError, match="trained on other data: another text"):
        train(lm, moved)


def test_a_text_without_end_is_known_by_its_first_documents(lm: LanguageModel) -> None:
    def contents(last: str) -> dict[str, str]:
        return stream_of(lm, lambda n: last if n == 63 else DOCUMENTS[n % 40], tokens=300).contents()

    assert contents("w5 w6") == contents("w5 w6")
    assert {k for k, v in contents("w5 w6").items() if contents("w6 w5")[k] != v} == {"text"}


def test_no_bos_is_put_where_none_is_asked_for(lm: LanguageModel) -> None:
    batches = stream_of(lm, bos=False, exclude_bos=False).batches(64, shuffle=False)
    first = next(iter(batches))
    assert first.positions[0] == 0
    assert lm.bos_token_id not in first.token_ids.tolist()
