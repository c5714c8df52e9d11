"""Vectors from examples: every method against its formula computed by hand, what it refuses, and its diagnostics."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import D, V, count_hooks, with_text
from torch import Tensor

from steersman import SteeringVector
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import METHODS, Steerer, contrast
from steersman.steer.methods.diagnostics import Agreement, d_prime, half_of, warnings
from steersman.steer.methods.moments import SampleFile

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
BUILT_IN = {name for name, method in METHODS.items() if method.__module__.startswith("steersman.steer.methods.")}
G = torch.Generator().manual_seed(3)


def random_text(n: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(4, V, (n,), generator=G).tolist())


LENGTHS = [3, 5, 2, 7, 4, 6, 3]
POSITIVE = ["w7 " + random_text(n) for n in LENGTHS]
NEGATIVE = ["w9 " + random_text(n) for n in LENGTHS]
PAIRED = [(p, " w11") for p in POSITIVE], [(p, " w12 w13") for p in POSITIVE]


def states(lm: LanguageModel, text: str, hook: str = HOOK) -> Tensor:
    """[S, D] of one text alone, the BOS left out."""
    return lm.capture(lm.encode([text]).input_ids, hooks=[hook])[hook][0, 1:]


def whole(example: Any) -> str:
    return example if isinstance(example, str) else "".join(example)


def make(lm: LanguageModel, method: str, positive: Any = POSITIVE, negative: Any = NEGATIVE, **options: Any) -> Tensor:
    return SteeringVector.contrast(lm, positive, negative, hook=HOOK, method=method, **options).vector


def test_every_method_of_the_table_is_there() -> None:
    streamed = {"caa", "diffmean", "mean_centred", "style", "east", "icv", "pca", "lat", "probe"}
    assert streamed | {"actadd", "optimised"} == BUILT_IN
    assert all(
        method.name == name and method.source.startswith("arXiv")
        for name, method in METHODS.items()
        if name in BUILT_IN
    )


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("method", ["diffmean", "mean_centred"])
def test_means_over_all_tokens(lm: LanguageModel, method: str, batch_size: int) -> None:
    expected = torch.cat([states(lm, t) for t in POSITIVE]).mean(0) - torch.cat(
        [states(lm, t) for t in NEGATIVE[:4]]
    ).mean(0)
    torch.testing.assert_close(make(lm, method, negative=NEGATIVE[:4], batch_size=batch_size), expected)


def test_mean_centred_takes_the_mean_of_a_corpus(lm: LanguageModel) -> None:
    mean = torch.cat([states(lm, t) for t in NEGATIVE]).mean(0)
    got = make(lm, "mean_centred", negative={"layers.1": mean})
    torch.testing.assert_close(got, make(lm, "mean_centred"), rtol=1e-4, atol=1e-5)
    with pytest.raises(SteersmanError, match="need.* 16 numbers|\\[16\\]"):
        make(lm, "mean_centred", negative={"layers.1": mean[:3]})
    with pytest.raises(SteersmanError, match="only .*mean_centred.* take"):
        make(lm, "caa", negative={"layers.1": mean})


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_caa_reads_the_answers(lm: LanguageModel, batch_size: int) -> None:
    """A mean over the answer's tokens, of one token or two; the prompt before it is equal and does not count."""
    expected = torch.stack(
        [states(lm, whole(p))[-1] - states(lm, whole(n))[-2:].mean(0) for p, n in zip(*PAIRED)]
    ).mean(0)
    torch.testing.assert_close(make(lm, "caa", *PAIRED, batch_size=batch_size), expected)


@pytest.mark.parametrize("method", ["diffmean", "caa", "pca", "lat", "probe"])
def test_every_example_changes_the_vector(lm: LanguageModel, method: str) -> None:
    """No example is dropped, and none is taken for all: changing any one of them moves the result."""
    tokens = "last"
    reference = make(lm, method, positions=tokens, diagnostics=False)
    for i in range(6 if method == "lat" else len(POSITIVE)):  # lat leaves the last of an odd number out
        changed = [*POSITIVE[:i], "w20 w21", *POSITIVE[i + 1 :]]
        assert not torch.allclose(
            make(lm, method, changed, positions=tokens, diagnostics=False), reference, atol=1e-5
        ), i


@pytest.mark.parametrize("tokens", ["last", "mean", "answer", "index:2", "index:-2"])
def test_which_tokens_are_read(lm: LanguageModel, tokens: str) -> None:
    read = {
        "last": lambda h: h[-1],
        "mean": lambda h: h.mean(0),
        "answer": lambda h: h[-2:].mean(0),
        "index:2": lambda h: h[1],  # position 0 is the BOS, which `states` leaves out
        "index:-2": lambda h: h[-2],
    }[tokens]
    positive = [(p, " w12 w13") for p in POSITIVE]
    negative = [(p, " w14 w15") for p in NEGATIVE]
    both = [torch.stack([read(states(lm, whole(e))) for e in side]).mean(0) for side in (positive, negative)]
    torch.testing.assert_close(make(lm, "diffmean", positive, negative, positions=tokens), both[0] - both[1])


def test_pca_is_the_first_component_of_the_pairs(lm: LanguageModel) -> None:
    d = torch.stack([states(lm, p)[-1] - states(lm, n)[-1] for p, n in zip(POSITIVE, NEGATIVE)])
    u = torch.linalg.svd(d.double(), full_matrices=False).Vh[0].float()
    torch.testing.assert_close(make(lm, "pca", batch_size=2), (u @ d.mean(0)) * u, rtol=1e-4, atol=1e-4)


def test_lat_is_seeded_and_points_to_the_positives(lm: LanguageModel) -> None:
    got = make(lm, "lat", batch_size=2, seed=5)
    assert got.equal(make(lm, "lat", batch_size=2, seed=5))
    assert torch.allclose(got, make(lm, "lat", batch_size=16, seed=5), atol=1e-5), "pairs change with the batch"
    assert not torch.allclose(got, make(lm, "lat", seed=6), atol=1e-3)
    difference = make(lm, "diffmean", positions="last")
    assert float(got @ difference) > 0


def test_probe_is_the_regularised_logistic_regression(lm: LanguageModel) -> None:
    sides = [torch.cat([states(lm, t) for t in side]).double() for side in (POSITIVE, NEGATIVE[:5])]
    x = torch.cat(sides)
    y = torch.cat([torch.ones(len(sides[0])), -torch.ones(len(sides[1]))]).double()
    z = (x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt()
    weight = torch.where(y > 0, 0.5 / len(sides[0]), 0.5 / len(sides[1]))
    w = torch.zeros(D + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        margin = y * (z @ w[:-1] + w[-1])
        value = (weight * torch.nn.functional.softplus(-margin)).sum() + 0.05 / 2 * w[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    u = (w[:-1] / w[:-1].norm()).detach()
    expected = (u @ (sides[0].mean(0) - sides[1].mean(0))) * u
    got = make(lm, "probe", negative=NEGATIVE[:5], l2=0.05, batch_size=3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_actadd_is_added_from_the_front(lm: LanguageModel) -> None:
    v = SteeringVector.contrast(lm, ["w5 w6 w7 w8"], ["w5 w9"], hook=HOOK, method="actadd")
    fill = v.metadata["filled_with_token"]
    plus, minus = lm.token_ids("w5 w6 w7 w8", bos=True), [*lm.token_ids("w5 w9", bos=True), fill, fill]
    h = lm.capture(torch.tensor([plus, minus]), hooks=[HOOK])[HOOK]
    torch.testing.assert_close(v.directions[HOOK], h[0] - h[1])
    assert v.positions == 5
    assert not v.directions[HOOK][:2].any(), "equal beginnings have equal states"
    ids = torch.tensor([[0, 20, 21, 22, 23, 24, 25]])
    clean = lm.capture(ids, hooks=[HOOK])[HOOK][0]
    with Steerer(lm).vector(v, scale=3.0) as context:
        steered = lm.capture(ids, hooks=[HOOK])[HOOK][0]
    torch.testing.assert_close(steered[:5], clean[:5] + 3 * v.directions[HOOK])
    assert steered[5:].equal(clean[5:])
    assert context.trace.pairs() == [(0, 2), (0, 3), (0, 4)]
    two = SteeringVector.contrast(lm, ["w5 w6 w7 w8", "w5 w6"], ["w5 w9", "w5 w9"], hook=HOOK, method="actadd")
    second = SteeringVector.contrast(lm, ["w5 w6"], ["w5 w9"], hook=HOOK, method="actadd")
    torch.testing.assert_close(two.directions[HOOK][:3], (v.directions[HOOK][:3] + second.directions[HOOK]) / 2)
    torch.testing.assert_close(two.directions[HOOK][3:], v.directions[HOOK][3:])


def test_optimised_raises_the_likelihood_of_the_completions(lm: LanguageModel) -> None:
    positive = [(p, " w30 w31") for p in POSITIVE[:3]]
    negative = [(p, " w40") for p in POSITIVE[:3]]

    def logp(examples: list[tuple[str, str]], v: SteeringVector | None) -> float:
        total = 0.0
        for prompt, answer in examples:
            ids = torch.tensor([lm.token_ids(prompt + answer, bos=True)])
            n = len(lm.token_ids(answer))
            if v is None:
                logits = lm.logits(ids)
            else:
                with Steerer(lm).vector(v):
                    logits = lm.logits(ids)
            p = logits[0].log_softmax(-1)[-n - 1 : -1]
            total += float(p.gather(1, ids[0, -n:, None]).sum())
        return total

    requires = [p.requires_grad for p in lm.model.parameters()]
    v = SteeringVector.contrast(lm, positive, negative, hook=HOOK, method="optimised", steps=40)
    assert logp(positive, v) > logp(positive, None) + 1
    alone = SteeringVector.contrast(lm, positive, hook=HOOK, method="optimised", steps=40)
    assert logp(negative, v) < logp(negative, alone)
    assert v.metadata["loss"] < v.metadata["loss_unsteered"]
    assert v.norm() <= v.metadata["bound"][HOOK] * (1 + 1e-5)
    assert [p.requires_grad for p in lm.model.parameters()] == requires
    assert count_hooks(lm.model) == 0
    again = SteeringVector.contrast(lm, positive, negative, hook=HOOK, method="optimised", steps=40)
    assert again.vector.equal(v.vector)


@pytest.mark.parametrize("method", sorted(BUILT_IN - {"optimised", "east", "icv"}))
def test_several_hook_points_equal_one_by_one(lm: LanguageModel, method: str) -> None:
    tokens: dict[str, Any] = {} if method == "actadd" else {"positions": "last"}
    both = contrast(lm, POSITIVE, NEGATIVE, hook=["layers.1", OTHER], method=method, **tokens)
    assert both.hook_names == [HOOK, OTHER]
    for hook in (HOOK, OTHER):
        alone = contrast(lm, POSITIVE, NEGATIVE, hook=hook, method=method, **tokens)
        torch.testing.assert_close(both.directions[hook], alone.directions[hook])


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_what_is_read_is_what_is_steered(family: str, layer: int) -> None:
    """Bitwise, at every layer, the last one too: states are read where the vector is added, before any final norm."""
    lm = with_text(family)
    hook = f"blocks.{layer}.hook_resid_post"
    seen: list[Tensor] = []
    ids = lm.encode(["w5 w6 w7"]).input_ids

    def look(h: Tensor, _now: Any) -> Tensor:
        seen.append(h.clone())
        return h

    with lm.edit(hook, look):
        lm.logits(ids)
    assert lm.capture(ids, hooks=[hook])[hook].equal(seen[0])
    v = contrast(lm, ["w5 w6 w7"], {hook: torch.zeros(D)}, hook=hook, method="mean_centred", positions="last")
    assert v.vector.equal(seen[0][0, -1].float())


def test_metadata_say_how_it_was_made(lm: LanguageModel, tmp_path: Path) -> None:
    v = contrast(lm, *PAIRED, hook=HOOK, method="caa", batch_size=4)
    assert (v.model_name, v.method, v.hook_name) == ("llama", "caa", HOOK)
    assert v.metadata["source"] == "arXiv 2312.06681"
    assert v.metadata["tokens"] == "answer"
    assert v.metadata["settings"]["batch_size"] == 4
    assert (v.metadata["n_positive"], v.metadata["n_negative"]) == (7, 7)
    v.save(tmp_path / "v.safetensors")
    assert SteeringVector.load(tmp_path / "v.safetensors").metadata == v.metadata


def test_diagnostics_tell_a_direction_from_none(lm: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        good = contrast(lm, *PAIRED, hook=HOOK, method="caa").metadata["diagnostics"][HOOK]
    assert not caplog.records
    assert good["agreement"] > 0.5
    assert good["split_half"] > 0.8
    assert good["auroc"] == good["pairs_right"] == 1.0
    assert good["d_prime"] > 2
    texts = [random_text(4) for _ in range(40)]
    with caplog.at_level(logging.WARNING):
        bad = contrast(lm, texts[:20], texts[20:], hook=HOOK, method="caa", positions="last").metadata["diagnostics"][
            HOOK
        ]
    assert abs(bad["agreement"]) < 0.15
    assert bad["auroc"] < 0.7, "held out: not what it was fitted to"
    assert any("hardly separates" in record.message for record in caplog.records)


def test_halves_are_dealt_by_chance() -> None:
    """Pairs whose answers alternate hold two opposite shifts beside what they share: each half must see both."""
    half = half_of(torch.arange(400))
    assert half.sum() == 200
    assert half.equal(torch.cat([half_of(part) for part in torch.arange(400).split(37)]))
    for period in (2, 3, 4, 8):
        for phase in range(period):
            of_phase = half[phase::period].float()
            assert abs(float(of_phase.mean()) - 0.5) < 2.5 / len(of_phase) ** 0.5


def test_diagnostics_by_hand() -> None:
    d = torch.randn(9, 5, generator=G)
    agreement = Agreement()
    agreement.add(d[:4])
    agreement.add(d[4:])
    agreement.add(torch.zeros(2, 5))
    cosines = torch.nn.functional.cosine_similarity(d[:, None], d[None], dim=-1)
    assert agreement.figures()["agreement"] == pytest.approx(float((cosines.sum() - 9) / 72), abs=1e-6)
    assert d_prime(torch.tensor([3.0, 5.0]), torch.tensor([0.0, 2.0])) == pytest.approx(3 / 2**0.5)
    assert d_prime(torch.ones(2), torch.zeros(2)) is None
    assert warnings({"agreement": 0.0, "split_half": 0.9, "auroc": 0.9, "heldout": True}) == [
        "the pairs' differences have little in common (agreement 0.00): no vector may fit all"
    ]
    assert "too few examples" in warnings({"heldout": False})[0]


def test_samples_go_over_the_disk() -> None:
    a, b = SampleFile(), SampleFile()
    x, y = torch.randn(10, 3, generator=G), torch.rand(10, generator=G) > 0.5
    a.add(x[:3], y[:3])
    a.add(x[3:6], y[3:6])
    b.add(x[6:], y[6:])
    for _ in range(2):
        parts = list(a.merged(b).chunks(rows=4))
        assert [len(part) for part, _ in parts] == [4, 2, 4]
        assert torch.cat([part for part, _ in parts]).equal(x)
        assert torch.cat([label for _, label in parts]).equal(y)
    a.add(x[:1], y[:1])  # after reading: at the end of the file
    assert torch.cat([part for part, _ in a.chunks()]).equal(torch.cat([x[:6], x[:1]]))


def test_no_method_keeps_the_states(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is alive after reading does not grow with the number of examples."""
    sizes = {}
    for method in ("diffmean", "pca", "lat"):
        for times in (1, 4):
            seen: list[Any] = []
            made = METHODS[method]

            def record(config: Any, kind: Any = made.estimator, seen: list[Any] = seen) -> Any:  # pyright: ignore[reportAttributeAccessIssue]
                seen.append(kind(config))
                return seen[-1]

            monkeypatch.setattr(made, "estimator", staticmethod(record))
            contrast(
                lm, POSITIVE * times, NEGATIVE * times, hook=HOOK, method=method, positions="last", diagnostics=False
            )
            monkeypatch.undo()
            numbers = 0
            for estimator in seen:
                for value in vars(estimator).values():
                    inner = getattr(value, "total", None)
                    numbers += inner.numel() if isinstance(inner, Tensor) else 0
            sizes[method, times] = numbers
        assert sizes[method, 1] == sizes[method, 4] > 0


WRONG: list[tuple[Any, Any, dict[str, Any], str]] = [
    (POSITIVE, NEGATIVE, {"method": "magic"}, "unknown method 'magic'; have actadd"),
    (POSITIVE, NEGATIVE, {"layer": 3}, "unknown setting 'layer'"),
    (POSITIVE, NEGATIVE, {"hook": "layers.7"}, "no layer 7, the model has 3 layers"),
    (POSITIVE, NEGATIVE, {"hook": []}, "at least one"),
    (POSITIVE, NEGATIVE, {"hook": [HOOK, "layers.1"]}, "each hook point once"),
    (POSITIVE, NEGATIVE[:3], {"method": "pca"}, "7 positives and 3 negatives"),
    (POSITIVE, NEGATIVE[:3], {"method": "actadd"}, "7 positives and 3 negatives"),
    (["w5", "  "], NEGATIVE, {}, "positive example 1 is empty"),
    (POSITIVE, ["w5", ("w6", " ")], {}, "negative example 1 has an empty answer"),
    (POSITIVE, ["w5", 7], {}, "negative example 1 is neither a text nor"),
    (POSITIVE, 7, {}, "must be a list of texts"),
    ([], NEGATIVE, {}, "no positive examples"),
    (POSITIVE, [], {}, "no negative examples"),
    (POSITIVE, NEGATIVE, {"positions": "answer"}, "reads the answer to a prompt, and positive example 0"),
    (POSITIVE, NEGATIVE, {"method": "caa"}, "reads the answer to a prompt, and positive example 0"),
    (POSITIVE, NEGATIVE, {"positions": "first"}, "unknown positions 'first'"),
    (POSITIVE, NEGATIVE, {"positions": "index:4"}, "positive example 2 has 4 tokens .BOS included., so no token 4"),
    (POSITIVE, NEGATIVE, {"method": "pca", "positions": "all"}, "one state per text"),
    (POSITIVE, NEGATIVE, {"method": "actadd", "positions": "last"}, "leave out positions"),
    (POSITIVE, NEGATIVE, {"method": "probe", "l2": 0.0}, "l2 must be above 0"),
    (POSITIVE, NEGATIVE, {"method": "optimised", "steps": 0}, "steps must be at least 1"),
    (POSITIVE, NEGATIVE, {"batch_size": 0}, "batch_size must be at least 1"),
    (POSITIVE, POSITIVE, {"method": "pca"}, "pca gives a zero vector at blocks.1"),
    (POSITIVE, POSITIVE, {}, "gives a zero vector at blocks.1"),
    (["w5 w6"], ["w5 w6"], {"method": "actadd"}, "actadd gives a zero vector"),
    (["w5 " * 40], NEGATIVE, {}, "positive example 0 has 41 tokens and the context of llama is 32"),
]  # fmt: skip


@pytest.mark.parametrize(("positive", "negative", "options", "message"), WRONG, ids=[w[3] for w in WRONG])
def test_wrong_input(lm: LanguageModel, positive: Any, negative: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message) as error:
        contrast(lm, positive, negative, **{"hook": HOOK, **options})
    assert "\n" not in str(error.value)
    assert count_hooks(lm.model) == 0


def test_states_that_are_not_finite(lm: LanguageModel) -> None:
    broken = with_text("llama")
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[9] = float("nan")
    with pytest.raises(
        SteersmanError, match="NaN or infinite states at blocks.1.hook_resid_post on negative example 0"
    ):
        contrast(broken, POSITIVE[:2], NEGATIVE[:2], hook=HOOK)


def test_max_length_cuts(lm: LanguageModel) -> None:
    long = ["w5 " * 40, "w6 w7"]
    got = make(lm, "diffmean", long, NEGATIVE, max_length=6, positions="last")
    short = make(
        lm, "diffmean", ["w5 w5 w5 w5 w5", "w6 w7"], [" ".join(t.split()[:5]) for t in NEGATIVE], positions="last"
    )
    torch.testing.assert_close(got, short)


STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260k is not here")
def test_a_trained_model_is_steered_towards_the_examples() -> None:
    """A vector of happy against sad texts makes happy words likelier in new texts, and its negative less likely."""
    lm = LanguageModel.load(str(STORIES), device="cpu")
    happy = [f"{name} was very happy . {name} smiled and laughed ." for name in ("Lily", "Tom", "Sue", "Ben", "Mia")]
    sad = [f"{name} was very sad . {name} cried and cried ." for name in ("Lily", "Tom", "Sue", "Ben", "Mia")]
    v = contrast(lm, happy, sad, hook="layers.2").calibrate(lm, target_kl=0.5)
    found = v.metadata["calibration"]
    assert found["converged"]
    assert len(found["evaluations"]) <= 8

    def margin(scale: float) -> float:
        ids = [lm.token_ids("Anna went home . She was very" + word, bos=True) for word in (" happy", " sad")]
        logp = []
        for row in ids:
            with Steerer(lm).vector(v, scale=scale):
                p = lm.logits(torch.tensor([row]))[0, :-1].log_softmax(-1)
            logp.append(float(p.gather(1, torch.tensor(row)[1:, None]).sum()))
        return logp[0] - logp[1]

    assert margin(1.0) > margin(0.0) > margin(-1.0)
