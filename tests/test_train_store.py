"""The activation store: what is written is read, in an order that is fixed, and damage is named."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import HOOK, digests, random_rows, store_of

from steersman.errors import SteersmanError
from steersman.train import ActivationStore, HookView
from steersman.train.store.manifest import Manifest
from steersman.train.store.order import RowOrder
from steersman.train.store.shards import DATA_OFFSET
from steersman.train.store.writer import StoreWriter

N, D = 1000, 12
X = random_rows(N, D)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return store_of(X, tmp_path_factory.mktemp("store") / "acts", model_name="a-model")


def rows_of(store: ActivationStore, batch_size: int = 64, **options: Any) -> torch.Tensor:
    return torch.cat([batch.rows for batch in store.batches(batch_size, **options)])


# What is written


def test_everything_written_is_read_back(store: ActivationStore) -> None:
    again = ActivationStore.open(store.path)
    assert (again.n_rows, again.d_in, again.dtype, again.complete) == (N, D, torch.bfloat16, True)
    assert (again.hook_name, again.hook_names, again.width(), again.model_name) == (HOOK, [HOOK], D, "a-model")
    assert [shard.rows for shard in again.manifest.shards] == [100] * 10
    order = torch.randperm(N)
    assert torch.equal(again.activations(order), X[order])
    info = again.row_info(order)
    assert torch.equal(info.doc_ids, order // 7)
    assert torch.equal(info.token_ids, (order % 50).int())
    part = again.tokens(95, 305)
    assert torch.equal(part.positions, torch.arange(95, 305).int())
    assert part.doc_ids.dtype == torch.int64


def test_the_shards_are_plain_safetensors(store: ActivationStore) -> None:
    shards = sorted((store.path / HOOK).iterdir())
    assert [shard.name for shard in shards][:2] == ["00000.safetensors", "00001.safetensors"]
    tensors = [safetensors.torch.load_file(shard) for shard in shards]
    assert [list(tensor) for tensor in tensors] == [[HOOK]] * 10
    assert torch.equal(torch.cat([tensor[HOOK] for tensor in tensors]), X)
    rows = safetensors.torch.load_file(store.path / "rows" / "00003.safetensors")
    assert torch.equal(rows["positions"], torch.arange(300, 400).int())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_statistics_are_those_of_the_stored_values(tmp_path: Path, dtype: str) -> None:
    x = random_rows(501, 8).float() * torch.logspace(-3, 2, 501)[:, None] + 0.3
    store = store_of(x, tmp_path / "acts", dtype=dtype)
    stored = x.to(getattr(torch, dtype)).double()
    norms = stored.norm(dim=1)
    stats = store.stats()
    assert torch.equal(store.activations(torch.arange(501)), x.to(getattr(torch, dtype)))
    torch.testing.assert_close(stats.mean, stored.mean(0).float(), rtol=1e-6, atol=0)
    assert stats.n_rows == 501
    assert stats.mean_norm == pytest.approx(norms.mean().item(), rel=1e-6)
    assert stats.mean_squared_norm == pytest.approx(norms.square().mean().item(), rel=1e-6)
    assert stats.median_norm == pytest.approx(norms.median().item(), rel=2**-13 + 1e-6)
    figures = json.loads((store.path / "manifest.json").read_text())["statistics"][HOOK]
    assert figures["median_norm"] == stats.median_norm


def test_rows_of_huge_norm_are_counted(tmp_path: Path) -> None:
    x = torch.nn.functional.normalize(random_rows(500, 8).float(), dim=1)
    assert not store_of(x * torch.linspace(0.2, 9, 500)[:, None], tmp_path / "ordinary").stats().large_rows()
    x[::100] *= 40
    store = store_of(x, tmp_path / "acts", dtype="float32")
    stats, share = store.stats(), 5 * 1600 / (5 * 1600 + 495)
    assert (stats.n_large, stats.large_share) == (5, pytest.approx(share, rel=1e-3))
    assert 40 <= stats.max_norm <= 40.01
    figures = json.loads((store.path / "manifest.json").read_text())["statistics"][HOOK]
    assert (figures["n_large"], figures["large_share"]) == (5, stats.large_share)
    assert stats.large_rows() == "5 rows (1 %) have norms above 10 x the median and hold 94.2 % of the squared norm"


def test_rows_of_zeros_have_norm_zero(tmp_path: Path) -> None:
    assert store_of(torch.zeros(9, 4), tmp_path / "acts").stats().median_norm == 0.0


def test_the_same_rows_give_the_same_bytes_in_other_batches(tmp_path: Path, store: ActivationStore) -> None:
    parts = [{"x": X[i : i + 250], "doc_ids": np.arange(i, i + 250) // 7, "token_ids": np.arange(i, i + 250) % 50,
              "positions": np.arange(i, i + 250)} for i in range(0, N, 250)]  # fmt: skip
    other = ActivationStore.from_tensors(parts, tmp_path / "acts", HOOK, model_name="a-model", shard_rows=100)
    mine, theirs = digests(store.path), digests(other.path)
    shards = [name for name in mine if name.startswith(HOOK)]
    assert len(shards) == 10
    assert {name: mine[name] for name in shards} == {name: theirs[name] for name in shards}


def test_numpy_arrays_and_one_large_batch(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(257, 3))
    store = ActivationStore.from_tensors([x], tmp_path / "a", "vision/block 3", dtype="float32", shard_rows=64)
    assert len(store.manifest.shards) == 5
    assert torch.equal(store.activations(np.arange(257)), torch.from_numpy(x).float())
    assert store.tokens(100, 103).doc_ids.tolist() == [100, 101, 102]
    assert (store.path / "vision_block_3" / "00000.safetensors").exists()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "iterable is empty"),
        ([torch.zeros(0, 4)], "nothing to store"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], "batch 1 of the tensors has width 5, earlier ones 4"),
        ([torch.zeros(3)], "batch 0 of the tensors is .*3"),
        ([torch.zeros(3, 4, dtype=torch.int64)], "int64"),
        ([[1.0, 2.0]], "is list"),
        (torch.zeros(3, 4), "wrap a single array in a list"),
        ([{"x": torch.zeros(3, 4), "doc_ids": [1, 2]}], "doc_ids is"),
        ([{"x": torch.zeros(2, 4), "token_ids": [0.5, 1.5]}], "token_ids is float"),
        ([{"x": torch.zeros(2, 4), "documents": [0, 1]}], "unknown keys"),
        ([torch.zeros(3, 4), torch.tensor([[0.0, 1.0, float("nan"), 3.0]])], "not finite .*document 3"),
        ([torch.full((2, 2), float("inf"))], "on_nonfinite='skip'"),
    ],
)
def test_tensors_that_make_no_store_are_refused_and_leave_nothing(tmp_path: Path, batches: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        ActivationStore.from_tensors(batches, tmp_path / "acts", HOOK)
    assert list(tmp_path.iterdir()) == []


def test_float16_overflow_says_which_type_would_do(tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="overflows float16 .*pass dtype='bfloat16'"):
        ActivationStore.from_tensors([torch.full((2, 2), 1e5)], tmp_path / "acts", HOOK, dtype="float16")


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"on_nonfinite": "ignore"}])
def test_unknown_choices_are_refused(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(SteersmanError, match=f"{next(iter(options.values()))}"):
        ActivationStore.from_tensors([X], tmp_path / "acts", HOOK, **options)  # pyright: ignore[reportArgumentType]


def test_skipped_rows_are_counted(tmp_path: Path) -> None:
    x = X.float().clone()
    bad = torch.tensor([0, 99, 100, 555, 999])
    x[bad, 3] = float("nan")
    store = store_of(x, tmp_path / "acts", on_nonfinite="skip")
    good = torch.ones(N, dtype=torch.bool).index_fill(0, bad, False)
    assert store.manifest.n_skipped == 5
    assert torch.equal(store.activations(np.arange(store.n_rows)), X[good])
    assert store.tokens(0, 1).positions.tolist() == [1]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, store: ActivationStore) -> None:
    with pytest.raises(SteersmanError, match="not empty"):
        ActivationStore.from_tensors([X], store.path, HOOK)
    assert ActivationStore.open(store.path, verify=True).n_rows == N


def test_two_processes_do_not_write_one_store(tmp_path: Path) -> None:
    def batches() -> Iterator[torch.Tensor]:
        yield X[:100]
        with pytest.raises(SteersmanError, match="another process is writing"):
            ActivationStore.from_tensors([X], tmp_path / "acts", HOOK)
        yield X[100:]

    store = ActivationStore.from_tensors(batches(), tmp_path / "acts", HOOK)
    assert torch.equal(store.activations(torch.arange(N)), X)
    assert [child.name for child in tmp_path.iterdir()] == ["acts"]


def test_what_a_killed_run_left_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    manifest = Manifest(model_name="", dtype="float32", hooks={"a": 2}, config={"source": "tensors"})
    writer = StoreWriter.begin(tmp_path / ".acts.partial", manifest, shard_rows=10)
    row = np.arange(25)
    writer.append({"a": torch.ones(25, 2)}, row, row, row)
    assert writer._lock is not None
    writer._lock.release()  # as a killed process does
    assert ActivationStore.from_tensors([X], tmp_path / "acts", HOOK).n_rows == N
    assert [child.name for child in tmp_path.iterdir()] == ["acts"]
    (tmp_path / ".other.partial").mkdir()
    (tmp_path / ".other.partial" / "notes.txt").write_text("mine")
    with pytest.raises(SteersmanError, match="files that Steersman did not write"):
        ActivationStore.from_tensors([X], tmp_path / "other", HOOK)
    assert (tmp_path / ".other.partial" / "notes.txt").read_text() == "mine"


# The order of reading


@pytest.mark.parametrize("window_bytes", [1, 3000, 1 << 30])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_epoch_holds_every_row_once_with_its_own_values(
    store: ActivationStore, window_bytes: int, prefetch: int
) -> None:
    options = {"split": "all", "drop_last": False, "window_bytes": window_bytes, "prefetch": prefetch}
    seen = []
    for batch in store.batches(64, **options):  # pyright: ignore[reportArgumentType]
        assert torch.equal(batch.x, X[batch.rows])
        assert torch.equal(batch.doc_ids, batch.rows // 7)
        seen.append(batch.rows)
    assert [len(rows) for rows in seen] == [64] * 15 + [40]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(N))


def test_the_order_follows_from_seed_and_epoch_alone(store: ActivationStore) -> None:
    first = rows_of(store, seed=3, epoch=1)
    assert torch.equal(first, rows_of(ActivationStore.open(store.path), seed=3, epoch=1, prefetch=0))
    assert torch.equal(rows_of(store, 32, seed=3, epoch=1)[: len(first)], first)
    assert not torch.equal(first, rows_of(store, seed=4, epoch=1))
    assert not torch.equal(first, rows_of(store, seed=3, epoch=2))
    assert torch.equal(rows_of(store, split="all", shuffle=False), torch.arange(N // 64 * 64))


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 40), batch_size=st.integers(1, 80), window_bytes=st.sampled_from([500, 4000, 1 << 30]))
def test_starting_at_a_batch_equals_skipping_to_it(
    store: ActivationStore, start: int, batch_size: int, window_bytes: int
) -> None:
    batches = [batch.rows for batch in store.batches(batch_size, seed=1, window_bytes=window_bytes)]
    later = [batch.rows for batch in store.batches(batch_size, seed=1, start=start, window_bytes=window_bytes)]
    assert len(later) == max(len(batches) - start, 0)
    assert all(torch.equal(a, b) for a, b in zip(batches[start:], later))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_shares_of_all_ranks_are_one_process_batches(store: ActivationStore, world_size: int) -> None:
    whole = list(store.batches(64, seed=5, window_bytes=4000))
    shares = [
        list(store.batches(64, seed=5, window_bytes=4000, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {len(whole)}
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([share[number].x for share in shares]), batch.x)
        assert all(len(share[number]) == 64 // world_size for share in shares)


def test_a_store_in_one_window_is_shuffled_fully() -> None:
    order = RowOrder([(0, 4096)], 64, shuffle=True, seed=0, epoch=0)
    assert (order.n_windows, order.n_rows) == (1, 4096)
    slots = order.slots(0, 0, 4096)
    # Neighbours on disk must be no nearer to each other than any two rows: about a third of the length apart.
    place = np.empty(4096)
    place[slots] = np.arange(4096)
    assert np.abs(np.diff(place)).mean() == pytest.approx(4096 / 3, rel=0.05)
    assert abs(np.corrcoef(np.arange(4096), slots)[0, 1]) < 0.05


def test_batches_of_a_large_store_come_from_nearly_as_many_blocks_as_they_could() -> None:
    # 8 MiB windows over 64 MiB: 128 blocks a window; a batch of 256 rows should touch about 128 * (1 - e^-2) of them.
    order = RowOrder([(0, 1 << 20)], 64, shuffle=True, seed=0, epoch=0, window_bytes=8 << 20)
    assert order.n_windows == 8
    blocks = {int(slot) // 1024 for slot in order.slots(3, 0, 256)}
    assert 100 < len(blocks) <= 128
    assert max(blocks) - min(blocks) > 900  # from all over the store
    assert order.window_of(order.window_start(5)) == 5


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    row_bytes=st.sampled_from([4096, 16384, 70000]),
    window_bytes=st.sampled_from([1, 100_000, 10**9]),
    shuffle=st.booleans(),
)
def test_every_order_is_a_permutation_of_its_ranges(
    lengths: list[int], row_bytes: int, window_bytes: int, shuffle: bool
) -> None:
    starts = np.cumsum([0, *(n + 3 for n in lengths)])  # gaps of three slots, as between shards
    ranges = [(int(start), int(start) + n) for start, n in zip(starts, lengths)]
    order = RowOrder(ranges, row_bytes, shuffle=shuffle, seed=1, epoch=2, window_bytes=window_bytes)
    whole = [order.slots(w, 0, order.n_rows) for w in range(order.n_windows)]
    slots = np.concatenate([*whole, np.zeros(0, dtype=np.int64)])
    expected = [slot for first, end in ranges for slot in range(first, end)]
    assert sorted(slots.tolist()) == expected
    assert shuffle or slots.tolist() == expected
    for window, of_window in enumerate(whole):
        assert order.window_start(window) == sum(map(len, whole[:window]))
        np.testing.assert_array_equal(order.slots(window, 1, 4), of_window[1:4])


def test_a_kept_batch_is_not_written_over(store: ActivationStore) -> None:
    kept = list(store.batches(64, split="all"))
    for _ in store.batches(64, split="all", seed=9):
        pass
    assert all(torch.equal(batch.x, X[batch.rows]) for batch in kept)


def test_leaving_early_stops_the_background_threads(store: ActivationStore) -> None:
    before = threading.active_count()
    for number, _ in enumerate(store.batches(8, prefetch=2)):
        if number == 3:
            break
    for thread in threading.enumerate():
        if thread.name.startswith("steersman-read"):
            thread.join(5)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 5000}, "fewer than batch_size 5000"),
        ({"batch_size": 64, "rank": 2, "world_size": 2}, "ranks count from 0"),
        ({"batch_size": 9, "world_size": 2}, "divide evenly"),
        ({"batch_size": 9, "hook": "blocks.7.hook_resid_post"}, "it has blocks.1.hook_resid_post"),
        ({"batch_size": 9, "split": "test"}, "none of train, heldout, all"),
        ({"batch_size": 9, "heldout_fraction": 1.0}, "heldout_fraction"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(store: ActivationStore, options: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        store.batches(**options)


# Several hook points


def store_of_hooks(folder: Path, **widths: int) -> ActivationStore:
    """A store of 3000 rows at hook points of these widths; the number in row r and column c of width D is r * D + c."""
    manifest = Manifest(model_name="m", dtype="float32", hooks=widths, config={})
    writer = StoreWriter.begin(folder, manifest, shard_rows=700)
    row = np.arange(3000)
    activations = {hook: torch.arange(3000.0 * width).reshape(3000, width) for hook, width in widths.items()}
    writer.append(activations, row, row, row)
    writer.finish()
    return ActivationStore.open(folder)


def test_hook_points_of_different_width_come_in_one_order(tmp_path: Path) -> None:
    store = store_of_hooks(tmp_path / "acts", a=2, b=5, c=384)
    for window_bytes in (1 << 27, 1 << 20, 30_000):
        options = {"seed": 3, "epoch": 1, "window_bytes": window_bytes}
        a, b, c = (rows_of(store, hook=hook, **options) for hook in "abc")
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert not torch.equal(a, a.sort().values)


@pytest.mark.parametrize("hooks", [{"a": 12}, {"a": 12, "b": 12}])
@pytest.mark.parametrize(
    ("window_bytes", "digest"),
    [(1 << 27, "4f027c9304303d47"), (1 << 20, "6a7657344d48b2ba"), (30_000, "e919a9ece2fec96e")],
)
def test_hook_points_of_one_width_come_in_the_order_of_the_first_release(
    tmp_path: Path, hooks: dict[str, int], window_bytes: int, digest: str
) -> None:
    store = store_of_hooks(tmp_path / "acts", **hooks)
    for hook in hooks:
        rows = rows_of(store, hook=hook, seed=3, epoch=1, window_bytes=window_bytes)
        assert hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16] == digest


def test_the_fingerprint_says_which_stores_changed_their_order(tmp_path: Path) -> None:
    # Run folders record it: a run that began in the old order must not be resumed in the new one.
    found = [
        store_of_whole_norms(tmp_path / str(i), **widths).fingerprint
        for i, widths in enumerate(({"a": 12}, {"a": 12, "b": 12}, {"a": 2, "b": 5}))
    ]
    assert found == ["5cb82e42626e3754", "64dbf9a3b0f46abf", "c30eb99c11933af3 in one order for all hook points"]


def store_of_whole_norms(folder: Path, **widths: int) -> ActivationStore:
    """A store whose statistics are the same in whatever order a processor adds: rows (r, 0, 0, ...)."""
    writer = StoreWriter.begin(
        folder, Manifest(model_name="m", dtype="float32", hooks=widths, config={}), shard_rows=700
    )
    row = np.arange(3000)
    writer.append(
        {hook: torch.eye(1, width) * torch.arange(3000.0)[:, None] for hook, width in widths.items()}, row, row, row
    )
    writer.finish()
    return ActivationStore.open(folder)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_view_gives_hook_points_side_by_side(tmp_path: Path, prefetch: int) -> None:
    store = store_of_hooks(tmp_path / "acts", a=2, b=5, c=384)
    view = HookView(store, ("c", "a"))
    assert (view.d_in, view.cuts, view.hooks, view.hook_name) == (386, (0, 384, 386), ("c", "a"), "c+a")
    assert (view.model_name, view.fingerprint, view.n_batches(64)) == ("m", store.fingerprint, store.n_batches(64))
    options = {"split": "all", "drop_last": False, "window_bytes": 30_000, "prefetch": prefetch, "seed": 5}
    kept = list(view.batches(64, **options))
    for batch, alone in zip(kept, store.batches(64, hook="a", **options), strict=True):  # pyright: ignore[reportArgumentType]
        c, a = batch.x.split([384, 2], dim=1)
        assert torch.equal(batch.rows, alone.rows)
        assert torch.equal(a, alone.x)
        assert torch.equal(c, store.activations(batch.rows, "c"))
        assert torch.equal(batch.doc_ids, alone.rows)
    assert torch.cat([batch.rows for batch in kept]).unique().numel() == 3000


def test_statistics_of_a_view_are_of_each_hook_point_and_of_all(tmp_path: Path) -> None:
    store = store_of_hooks(tmp_path / "acts", a=2, b=5)
    view, x = HookView(store, ["a", "b"]), torch.cat([store.activations(np.arange(3000), hook) for hook in "ab"], dim=1)
    stats = view.stats()
    assert torch.equal(view.stats("b").mean, store.stats("b").mean)
    torch.testing.assert_close(stats.mean, x.mean(0))
    assert stats.mean_squared_norm == pytest.approx(x.double().square().sum(1).mean().item())
    assert stats.n_rows == 3000
    assert stats.median_norm == pytest.approx(x.norm(dim=1).median().item(), rel=1e-3)
    assert HookView(store, "b").stats().median_norm == store.stats("b").median_norm


@pytest.mark.parametrize(
    ("hooks", "message"),
    [((), "one or several different hook points"), (("a", "a"), "different"), (("a", "x"), "no hook point 'x'")],
)
def test_hook_points_that_make_no_view_are_refused(tmp_path: Path, hooks: tuple[str, ...], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        HookView(store_of_hooks(tmp_path / "acts", a=2, b=5), hooks)


# Held-out rows


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3])
def test_held_out_rows_are_the_last_documents(store: ActivationStore, fraction: float) -> None:
    start, stop = store.split_rows("heldout", fraction)
    assert (store.split_rows("train", fraction), stop) == ((0, start), N)
    assert start % 7 == 0
    assert fraction * N <= N - start < fraction * N + 7
    train = torch.cat([b.doc_ids for b in store.batches(1, heldout_fraction=fraction)])
    held = torch.cat([b.doc_ids for b in store.batches(1, split="heldout", heldout_fraction=fraction)])
    assert train.max() < held.min()
    assert store.n_batches(8, split="heldout", heldout_fraction=fraction, drop_last=False) == -(-(N - start) // 8)


def test_no_rows_are_held_out_when_none_are_asked_for(store: ActivationStore) -> None:
    assert store.split_rows("train", 0.0) == (0, N)
    assert store.n_batches(8, split="heldout", heldout_fraction=0.0) == 0


def test_one_long_document_is_cut_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_of(X, tmp_path / "acts", document_rows=N)
    assert store.split_rows("train", 0.1) == (0, 900)
    assert "held-out rows are cut from it" in caplog.text


# Damage


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def _other_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + content[8:DATA_OFFSET].replace(b"BF16", b"I16 ") + content[DATA_OFFSET:])


def _broken_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"{{" + content[10:])


SHARD, ROWS = f"{HOOK}/00004.safetensors", "rows/00004.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (SHARD, _cut, f"{SHARD}.*cut short"),
        (SHARD, Path.unlink, f"{SHARD}.*missing"),
        (SHARD, _flip, f"{SHARD}.*checksum"),
        (SHARD, _other_header, f"{SHARD}.*header describes"),
        (SHARD, _broken_header, f"{SHARD}.*header is damaged"),
        (ROWS, _cut, f"{ROWS}.*cut short"),
        (ROWS, Path.unlink, f"{ROWS}.*missing"),
        (ROWS, _flip, f"{ROWS}.*checksum"),
        ("manifest.json", _cut, "manifest.json: not a readable"),
        ("manifest.json", Path.unlink, "no activation store here"),
    ],
)
def test_damage_is_named_when_the_store_is_opened(
    tmp_path: Path, file: str, damage: Callable[[Path], None], message: str
) -> None:
    store_of(X, tmp_path / "acts")
    damage(tmp_path / "acts" / file)
    with pytest.raises(SteersmanError, match=message):
        ActivationStore.open(tmp_path / "acts")


def test_a_large_store_is_verified_on_request(tmp_path: Path) -> None:
    store_of(X, tmp_path / "acts")
    _flip(tmp_path / "acts" / SHARD)
    store = ActivationStore.open(tmp_path / "acts", verify=False)
    with pytest.raises(SteersmanError, match=f"{SHARD}.*checksum"):
        store.verify()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("behind", [0, 1 << 40])
def test_shards_of_a_large_store_are_verified_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: bool, behind: int
) -> None:
    monkeypatch.setattr("steersman.train.store.store._VERIFIED_AT_OPEN", 0)
    monkeypatch.setattr("steersman.train.store.store._VERIFIED_BEHIND", behind)
    store_of(X, tmp_path / "acts")
    _flip(tmp_path / "acts" / SHARD)
    store = ActivationStore.open(tmp_path / "acts")
    assert torch.equal(store.activations(torch.arange(400)), X[:400])
    with pytest.raises(SteersmanError, match=f"{SHARD}.*checksum"):
        store.activations(torch.tensor([410]))
    store = ActivationStore.open(tmp_path / "acts")
    with pytest.raises(SteersmanError, match=f"{SHARD}.*checksum"):
        sum(len(batch) for epoch in range(1000) for batch in store.batches(50, shuffle=shuffle, epoch=epoch))
    _flip(tmp_path / "acts" / ROWS)
    with pytest.raises(SteersmanError, match=f"{ROWS}.*checksum"):
        ActivationStore.open(tmp_path / "acts").tokens(0, 500)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("damage", [_cut, Path.unlink])
@pytest.mark.parametrize("file", [SHARD, ROWS])
def test_files_that_vanish_while_a_store_is_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: Callable[[Path], None], mapped: bool
) -> None:
    if not mapped:
        monkeypatch.setattr("steersman.train.store.mapping.max_mapped", lambda: 0)
    for begun in (False, True):
        store = store_of(X, tmp_path / f"acts{begun}")
        rows = torch.arange(400, 500)
        if begun:
            store.activations(rows)
            store.row_info(rows)
        damage(store.path / file)
        if begun and file == SHARD and mapped:
            monkeypatch.setattr(store._mapped(HOOK)._guard, "_next", 0.0)  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(SteersmanError, match=f"{file}.*(cut short|missing)"):
            store.activations(rows) if file == SHARD else store.row_info(rows)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(0, 2999), max_size=60))
def test_shards_too_many_to_be_mapped_are_read(tmp_path_factory: pytest.TempPathFactory, rows: list[int]) -> None:
    folder = Path(tmp_path_factory.getbasetemp()) / "many"
    store = ActivationStore.open(folder) if folder.exists() else store_of_hooks(folder, a=2, b=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steersman.train.store.mapping.max_mapped", lambda: 3)
        other = ActivationStore.open(folder)
        for hook in "ab":
            expected = store.activations(np.array(rows), hook)
            assert torch.equal(other.activations(np.array(rows), hook), expected)
        if rows:
            batches = zip(store.batches(64, hook=["b", "a"]), other.batches(64, hook=["b", "a"]), strict=True)
            assert all(torch.equal(one.x, two.x) for one, two in batches)


def test_missing_statistics_are_named(tmp_path: Path) -> None:
    store = store_of(X, tmp_path / "acts")
    (store.path / "statistics.safetensors").unlink()
    with pytest.raises(SteersmanError, match=r"statistics\.safetensors.*missing"):
        store.stats()


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"format": "other"}, {"dtype": "int4"}, {"n_rows": 5}, {"hooks": {}}, {"surprise": 1}],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    store_of(X, tmp_path / "acts")
    path = tmp_path / "acts" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SteersmanError, match=r"manifest\.json"):
        ActivationStore.open(tmp_path / "acts")


@pytest.mark.parametrize("rows", [[-1], [N]])
def test_rows_that_do_not_exist_are_refused(store: ActivationStore, rows: list[int]) -> None:
    with pytest.raises(SteersmanError, match="not among its 1000 rows"):
        store.activations(torch.tensor(rows))
    with pytest.raises(SteersmanError, match="not among its 1000 rows"):
        store.row_info(torch.tensor(rows))
    with pytest.raises(SteersmanError, match="rows 5 to 1001"):
        store.tokens(5, N + 1)


# Writing


def writer_of(folder: Path, **config: Any) -> StoreWriter:
    manifest = Manifest(model_name="m", dtype="float32", hooks={"a": 2, "b": 3}, config=config)
    return StoreWriter.begin(folder, manifest, shard_rows=10)


def append(writer: StoreWriter, n: int, cursor: int = 0) -> None:
    row = np.arange(n)
    writer.append({"a": torch.ones(n, 2), "b": torch.ones(n, 3)}, row, row, row, cursor={"document": cursor})


def test_several_hook_points_share_their_rows(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "acts")
    append(writer, 25)
    writer.finish()
    store = ActivationStore.open(tmp_path / "acts")
    assert (store.hook_names, store.width("b"), store.n_rows) == (["a", "b"], 3, 25)
    assert [batch.x.shape for batch in store.batches(25, hook="b", split="all")] == [(25, 3)]
    assert store.stats("b").mean_norm == pytest.approx(3**0.5)


def test_an_unfinished_store_says_how_to_finish_it(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "acts")
    append(writer, 25)
    writer.abandon()
    with pytest.raises(SteersmanError, match="interrupted after 20 rows; run the command .* again"):
        ActivationStore.open(tmp_path / "acts")
    store = ActivationStore.open(tmp_path / "acts", allow_partial=True)
    assert (store.n_rows, store.complete, store.stats().n_rows) == (20, False, 20)


def test_a_store_of_another_configuration_names_the_fields(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "acts", tokens=5, seed=1)
    append(writer, 25)
    writer.abandon()
    with pytest.raises(SteersmanError, match="another configuration: tokens was 5, now 7; "):
        writer_of(tmp_path / "acts", tokens=7, seed=1)
    assert writer_of(tmp_path / "acts", tokens=5, seed=1).n_rows == 20


def test_two_writers_of_one_store_are_refused(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "acts")
    code = (
        "from pathlib import Path; from steersman.train.store.manifest import Manifest\n"
        "from steersman.train.store.writer import StoreWriter\n"
        "m = Manifest(model_name='m', dtype='float32', hooks={'a': 2, 'b': 3}, config={})\n"
        f"StoreWriter.begin(Path({str(tmp_path / 'acts')!r}), m, shard_rows=10)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process is writing this store" in other.stderr
    writer.abandon()
    writer_of(tmp_path / "acts").abandon()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SteersmanError, match="not an activation store"):
        writer_of(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SteersmanError, match="a part of the path is a file|exists"):
        writer_of(tmp_path / "file" / "acts")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_after_a_failed_write_nothing_more_is_taken(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "acts")
    append(writer, 12)
    with pytest.raises(SteersmanError, match="not finite"):
        writer.append({"a": torch.full((1, 2), torch.nan), "b": torch.ones(1, 3)}, *[np.zeros(1, np.int64)] * 3)
    with pytest.raises(SteersmanError, match="earlier write failed"):
        append(writer, 30)
    writer.abandon()
    assert ActivationStore.open(tmp_path / "acts", allow_partial=True).n_rows == 10
