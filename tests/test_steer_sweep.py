"""`sweep_layers` and `steersman vector sweep`: the planted layer, the nulls, resuming, mistakes."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import fails
from support.tiny_models import D, with_text

from steersman import LanguageModel, Steerer, SteeringVector
from steersman.cli import main
from steersman.demo import MODEL_PATH, texts
from steersman.errors import SteersmanError
from steersman.lm.lens import norm_gain
from steersman.steer import FunctionEdit, Sweep, sweep_layers
from steersman.steer.analysis import sweep as sweep_module
from steersman.steer.analysis.sweep import Cell, choose, held_out, permuted
from steersman.steer.methods.examples import Examples, as_examples

WORDS = list(range(5, 30))
POSITIVE = [f"w{i} w{i + 1} w40" for i in WORDS[:16]]
NEGATIVE = [f"w{i} w{i + 1} w41" for i in WORDS[:16]]
ITEMS = [(f"w{i} w{i + 2} w50", " w31", " w32") for i in WORDS[:20]]
TEXTS = [f"w{i} w50 w{i + 4} w{i + 2} w50 w{i + 1}" for i in WORDS[:8]]
SETTINGS: dict[str, Any] = {"positions": "last", "target_kl": (0.1,), "nulls": 3, "texts": TEXTS, "items": ITEMS}


@pytest.fixture(scope="module")
def planted() -> Iterator[LanguageModel]:
    """A model in which only u, at the output of block 1, leads to w31 in place of w32, after w50; the examples differ
    along u there and nowhere else. What carries u across the other layers is cut."""
    lm = with_text("llama")
    g = torch.Generator().manual_seed(4)
    u = torch.randn(D, generator=g)
    u /= u.norm()
    W_U, norm = lm.unembed()
    push = ((W_U[:, 31] - W_U[:, 32]) * norm_gain(norm)).detach()
    push = push / push.norm()

    def without_u(h: torch.Tensor) -> torch.Tensor:
        return h - (h @ u)[..., None] * u

    def write(h: torch.Tensor, fwd: Any) -> torch.Tensor:
        here = (fwd.input_ids == 50)[..., None]
        return without_u(h) + 6 * (h @ u)[..., None] * push * here

    with torch.no_grad():  # sure enough of itself, and the two words that tell the sides apart are nearly one
        lm.model.lm_head.weight *= 5
        embed = lm.model.get_input_embeddings().weight
        embed[41] = embed[40] + 0.05 * torch.randn(D, generator=g)
    st = Steerer(lm)
    edits = [
        ("blocks.1.hook_resid_pre", FunctionEdit(lambda h, fwd: without_u(h))),
        (
            "blocks.1.hook_resid_post",
            FunctionEdit(lambda h, fwd: without_u(h) + 2 * u * (fwd.input_ids == 40)[..., None]),
        ),
        ("blocks.2.hook_resid_post", FunctionEdit(write)),
    ]
    with ExitStack() as stack:
        for hook, edit in edits:
            stack.enter_context(st.edit(hook, edit, include_bos=True))
        yield lm


@pytest.fixture(scope="module")
def found(planted: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep_layers(planted, POSITIVE, NEGATIVE, out=tmp_path_factory.mktemp("sweep") / "s.json", **SETTINGS)


def test_the_planted_layer_is_found_and_chance_is_not(found: Sweep) -> None:
    choice = found.choices[0.1]
    assert choice.hook_name == "blocks.1.hook_resid_post"
    assert choice.effect.low > 0
    assert choice.null_largest is not None
    assert choice.null_mean is not None
    assert choice.effect.mean > choice.null_largest
    assert choice.effect.mean > 2 * choice.null_mean
    assert choice.p_value == pytest.approx(1 / 7), "the least that six nulls allow"
    assert choice.effect.n == len(ITEMS) // 2
    for hook in found.hooks:
        cell = found.cell(hook, 0.1)
        assert not cell.converged or cell.kl == pytest.approx(0.1, rel=0.1), "compared at equal KL"
    v = found.vector()
    assert v.hook_names == ["blocks.1.hook_resid_post"]
    assert v.metadata["sweep"]["hooks_tried"] == 3
    assert found.vectors.at(v.hook_name).norm() * choice.scale == pytest.approx(v.norm(), rel=1e-5)
    assert "blocks.1.hook_resid_post at scale" in found.to_text()


def test_effects_are_the_rise_of_the_margin(planted: LanguageModel, found: Sweep) -> None:
    cell = found.cell("blocks.1.hook_resid_post", 0.1)

    def margin(prompt: str) -> float:
        p = planted.logits(planted.encode([prompt]).input_ids)[0, -1].log_softmax(-1)
        return float(p[31] - p[32])

    for item, effect in list(zip(ITEMS, cell.effects))[:3]:
        plain = margin(item[0])
        with Steerer(planted).vector(found.vectors.at(cell.hook_name), scale=cell.scale):
            assert margin(item[0]) - plain == pytest.approx(effect, abs=1e-3)


def test_the_even_items_choose_and_the_odd_ones_report() -> None:
    def cell(hook: str, even: float, odd: float, **of: Any) -> Cell:
        settings = {"kind": "vector", "draw": 0, "converged": True, **of}
        return Cell(hook_name=hook, budget=0.1, scale=1.0, kl=0.1, effects=[even, odd] * 4, **settings)

    cells = [cell("a", 1.0, 5.0), cell("b", 2.0, 3.0), cell("c", 9.0, 9.0, converged=False)]
    cells += [cell(h, e, o, kind="random", draw=i) for i, (h, e, o) in enumerate([("a", 1, 4), ("b", 1, 1)])]
    got = choose(cells, 0.1)
    assert got is not None
    assert (got.hook_name, got.effect.mean) == ("b", 3.0)
    assert (got.null_largest, got.null_mean, got.p_value, got.random_here) == (4.0, 2.5, 2 / 3, 1.0)
    assert choose(cells, 0.3) is None


def test_an_interrupted_sweep_goes_on(
    planted: LanguageModel, found: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "s.json", []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) == 5:
            raise KeyboardInterrupt
        return calibrate(*args, **kwargs)

    calibrate = sweep_module.calibrate
    monkeypatch.setattr(sweep_module, "calibrate", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep_layers(planted, POSITIVE, NEGATIVE, out=out, **SETTINGS)
    assert len(json.loads(out.read_text())["cells"]) == 4
    again = sweep_layers(planted, POSITIVE, NEGATIVE, out=out, **SETTINGS)
    assert len(done) == 5 + 3 * 7 - 4, "nothing is measured twice"
    assert again.cells == found.cells
    with pytest.raises(SteersmanError, match=r"is of another sweep \(nulls was 3, now 1\)"):
        sweep_layers(planted, POSITIVE, NEGATIVE, out=out, **{**SETTINGS, "nulls": 1})
    out.write_text("{}")
    with pytest.raises(SteersmanError, match="is no file of a sweep"):
        sweep_layers(planted, POSITIVE, NEGATIVE, out=out, **SETTINGS)


def test_held_out_pairs_and_permuted_labels() -> None:
    pairs = Examples(
        positive=as_examples([(f"p{i}", f" y{i}") for i in range(8)], "positive"),
        negative=as_examples([(f"p{i}", f" n{i}") for i in range(8)], "negative"),
    )
    kept, items = held_out(pairs)
    assert [e.prompt for e in kept.positive] == ["p0", "p2", "p4", "p6"]
    assert (items[0].prompt, items[0].positive, items[0].negative) == ("p1", " y1", " n1")
    mixed = permuted(pairs, 0)
    swapped = [p.text[-2] == "n" for p in mixed.positive]
    assert sum(swapped) == 4
    assert [p.prompt for p in mixed.positive] == [n.prompt for n in mixed.negative], "pairs stay pairs"
    uneven = permuted(Examples(positive=pairs.positive, negative=pairs.negative[:3]), 0)
    assert (len(uneven.positive), len(uneven.negative)) == (8, 3)
    with pytest.raises(SteersmanError, match="share their prompt"):
        held_out(Examples(positive=pairs.positive, negative=pairs.negative[::-1]))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [
        {"prompt": f"{name} saw the", "positive": " snow", "negative": " fog"}
        for name in ("Anna", "Tom", "Mia", "Ben", "Anna and Tom", "Mia and Ben", "Tom and Ben", "At noon Mia")
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    (tmp_path / "texts.txt").write_text("\n".join(texts(4, seed=3)) + "\n")
    flags = ["--model", str(MODEL_PATH), "--data", str(tmp_path / "pairs.jsonl"), "--text", str(tmp_path / "texts.txt")]
    flags += ["--method", "caa", "--layer", "1", "--layer", "2", "--nulls", "1", "--target-kl", "0.2"]
    flags += ["--out", str(tmp_path / "s.json"), "--vector", str(tmp_path / "v.safetensors")]
    main(["vector", "sweep", *flags])
    assert "KL 0.2: blocks." in capsys.readouterr().out
    v = SteeringVector.load(tmp_path / "v.safetensors")
    assert v.method == "caa"
    main(["vector", "sweep", *flags, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert [e["hook"] for e in shown["effects"]] == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    assert np.isfinite(shown["choices"][0]["effect"]["mean"])
    line = fails(capsys, "vector", "sweep", "--model", str(MODEL_PATH), "--out", str(tmp_path / "t.json"))
    assert "a sweep needs examples: give --data" in line
