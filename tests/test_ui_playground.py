"""The playground's engine: a state does what the Python it stands for does, to the last token."""

import json
import shlex
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_toys import chat_model, talk
from support.tiny_models import count_hooks

from steersman.cli import main
from steersman.demo import MODEL_PATH
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE, FeatureLabel, FeatureLabels, SAEConfig
from steersman.sae.base import FeatureStats
from steersman.steer import EffectMap, Recipe, Steerer, SteeringVector
from steersman.steer.effects.measured import Baseline, sae_identity
from steersman.ui.playground import panels, sharing
from steersman.ui.playground.catalogue import Catalogue
from steersman.ui.playground.engine import Engine
from steersman.ui.playground.queue import Event, FullError, Job, JobQueue
from steersman.ui.playground.state import State, state_from

HOOK, WIDTH, FEATURES = "blocks.2.hook_resid_post", 128, 32
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of the bundled model with statistics and labels, a vector, and what its features are said to fire on."""
    folder = tmp_path_factory.mktemp("playground")
    sae = SAE(
        SAEConfig(d_in=WIDTH, d_sae=FEATURES, k=4, hook_name=HOOK, model_name="steersman-demo"),
        torch.Generator().manual_seed(0),
    )
    largest = torch.full((FEATURES,), 20.0)
    largest[9] = 0.0
    sae.feature_stats = FeatureStats(
        max_act=largest, density=largest / 100, mean_act=largest / 2, n_tokens=1000, median_norm=10.0
    )
    sae.labels = FeatureLabels({3: FeatureLabel(text="foggy <b>weather</b>"), 4: FeatureLabel(text="dogs")})
    sae.save(folder / "sae")
    direction = 8 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    SteeringVector.of(direction, hook_name=HOOK, model_name="steersman-demo").save(folder / "calm.safetensors")
    described = [{"id": 5, "fires_on": [" fog"], "promotes": [" weather"], "suppresses": [], "contexts": []}]
    (folder / "sae" / "features.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    sae = SAE.load(folder / "sae")
    effects = EffectMap(
        M=torch.randn(WIDTH, FEATURES, generator=torch.Generator().manual_seed(2)),
        b=torch.zeros(FEATURES),
        signal=torch.full((FEATURES,), 9.0),
        noise=torch.ones(FEATURES),
        r2=torch.ones(FEATURES),
        ceiling=torch.ones(FEATURES),
        baseline=Baseline(mean=torch.zeros(FEATURES), standard_error=torch.zeros(FEATURES), median_norm=10.0),
        model_name="steersman-demo",
        hook_name=HOOK,
        sae=sae_identity(sae),
        provenance={"median_scale": 12.0},
    )
    effects.save(folder / "map.safetensors")
    made = Engine(
        lm=LanguageModel.load(str(MODEL_PATH)), sae=sae, model_source=str(MODEL_PATH), sae_source=str(folder / "sae"),
        effects=effects, effects_source=str(folder / "map.safetensors"),
    )  # fmt: skip
    made.add_vector(folder / "calm.safetensors")
    return made


def asked(interventions: Sequence[Any] = (), prompt: Any = PROMPT, **generation: Any) -> State:
    """A state; a feature is given as (id, strength) or with its settings as a dict, a vector by its name."""
    field = "prompt" if isinstance(prompt, str) else "messages"
    dials = [{"kind": "feature", "units": "max_act", **one} if "id" in one else one for one in interventions]
    held = {field: prompt, "interventions": dials, "generation": {"max_new_tokens": 8, **generation}}
    return state_from(held, units="raw")


FEATURE = {"id": 3, "strength": 1.5}
SECOND = {"id": 4, "strength": -1.0}
CLAMPED = {"id": 4, "strength": 0.5, "mode": "clamp", "scope": "all", "include_bos": True}
VECTOR = {"kind": "vector", "name": "calm", "strength": 1.5, "scope": "all"}
CASES: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "features": [FEATURE, SECOND],
    "a vector": [VECTOR],
    "flags": [{**FEATURE, "scope": "all"}, VECTOR],
    "all": [VECTOR, FEATURE, CLAMPED, SECOND],
}


def run(engine: Engine, state: State, sides: Sequence[str] = ("steered", "plain")) -> list[Event]:
    engine.check(state)
    return list(engine.generate(state, sides, lambda: False))


def texts(events: Sequence[Event]) -> dict[str, str]:
    return {e.data["side"]: e.data["text"] for e in events if e.name == "end"}


@pytest.mark.parametrize("name", CASES)
def test_both_sides_are_what_python_and_the_command_give(
    engine: Engine, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = asked(CASES[name])
    found = texts(run(engine, state))
    assert found["plain"] == engine.lm.generate(PROMPT, max_new_tokens=8).completions[0]
    assert (found["steered"] == found["plain"]) == (name == "nothing")
    assert count_hooks(engine.lm.model) == 0
    assert printed_by(sharing.python_of(engine, state), capsys) == found["steered"]
    command = sharing.command_of(engine, state)
    if name == "nothing":
        assert command is None
        return
    assert command is not None
    monkeypatch.chdir(tmp_path)
    (pair,) = by_command(command, capsys)["pairs"]
    assert (pair["steered"], pair["unsteered"]) == (found["steered"], found["plain"])
    assert ("--recipe" in command) == (name in ("all",))


def printed_by(program: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a program prints, without the line's end."""
    capsys.readouterr()
    exec(compile(program, "<copied>", "exec"), {"__name__": "copied"})
    return capsys.readouterr().out.removesuffix("\n")


def by_command(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the last command of a shell text gives as JSON; bash reads the text, the commands run here."""
    script = 'steersman() { printf "%s\\0" "$@" >> argv; printf "\\1\\0" >> argv; }\n' + command
    subprocess.run(["bash", "-euc", script], check=True)
    argvs = [one.split("\0")[:-1] for one in Path("argv").read_text().split("\1\0")[:-1]]
    for argv in argvs:
        capsys.readouterr()
        main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_sampling_chats_and_odd_prompts_are_the_same_everywhere(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = "--it's $HOME `x`\nEND\n\x1b[31m \u202eabc \U0001f600"
    state = asked([FEATURE], odd, temperature=0.8, top_p=0.9, seed=7)
    found = texts(run(engine, state))
    command = sharing.command_of(engine, state)
    assert command is not None
    assert "\x1b" not in command
    assert "\u202e" not in command
    assert by_command(command, capsys)["pairs"][0]["steered"] == found["steered"]
    assert printed_by(sharing.python_of(engine, state), capsys) == found["steered"]
    assert shlex.split(command)


def test_a_chat_is_replied_to_by_the_template(engine: Engine) -> None:
    lm = chat_model("chatml")
    sae = SAE(SAEConfig(d_in=16, d_sae=24, k=4, hook_name="blocks.1.hook_resid_post"), torch.Generator().manual_seed(0))
    with torch.no_grad():
        lm.model.lm_head.weight *= 5
    chat = Engine(lm=lm, sae=sae)
    dial = {"kind": "feature", "id": 3, "strength": 9.0, "scope": "assistant", "units": "raw"}
    messages = talk("w1 w2", "w3", "w4", system="w5")
    state = asked([dial], messages, max_new_tokens=12)
    events = run(chat, state)
    with Steerer(lm).features(sae, {3: 9.0}, scope="assistant"):
        steered = lm.chat(messages, max_new_tokens=12).completions[0]
    assert texts(events) == {"steered": steered, "plain": lm.chat(messages, max_new_tokens=12).completions[0]}
    assert texts(events)["steered"] != texts(events)["plain"]
    rows, _ = panels.dose(chat, state, 0, [0.0, 9.0], lambda: False) or ([], None)
    assert [row["text"] for row in rows] == [texts(events)["plain"], steered]
    with pytest.raises(SteersmanError, match="no chat template"):
        engine.check(asked([], messages))
    with pytest.raises(SteersmanError, match=r"interventions\[0\].*a part of a chat"):
        chat.check(asked([dial], "w1 w2"))


def test_tokens_come_with_the_activations_of_the_state_that_the_model_goes_on_from(engine: Engine) -> None:
    state = state_from({**asked([{**FEATURE, "scope": "all"}], max_new_tokens=6).record(), "watch": [7]})
    events = run(engine, state, ["steered"])
    with Steerer(engine.lm).features(engine.sae, {3: 1.5}, units="max_act", scope="all"):
        text = engine.lm.generate(PROMPT, max_new_tokens=6)
        states = engine.lm.capture(text.batch, hooks=HOOK, prompt_length=text.prompt_length)[HOOK][0]
    code = engine.sae.encode(states)
    (prompt,) = [e.data["tokens"] for e in events if e.name == "prompt"]
    shown = [token["features"] for token in prompt]
    shown += [e.data["features"] for e in sorted(by_name(events, "features"), key=lambda e: e.data["index"])]
    assert len(shown) == len(code) == len(prompt) + 6
    assert prompt[0]["special"]
    assert shown[0] == []  # the BOS
    for features, row in zip(shown[1:], code[1:]):
        assert features[0]["id"] == 7
        assert features[0]["watched"]
        for one in features:
            assert one["value"] == pytest.approx(float(row[one["id"]]), abs=1e-3)
        assert max(float(row.abs().max()), 0) == pytest.approx(max(abs(f["value"]) for f in features), abs=1e-3)
    assert "".join(token["text"] for token in prompt if not token["special"]) == PROMPT
    assert "".join(e.data["text"] for e in by_name(events, "token")) == text.completions[0]


def by_name(events: Sequence[Event], name: str) -> list[Event]:
    return [event for event in events if event.name == name]


def test_stopping_ends_within_a_token_and_leaves_nothing(engine: Engine) -> None:
    stopped = threading.Event()
    events = []
    for event in engine.generate(asked([FEATURE], max_new_tokens=100), ["steered", "plain"], stopped.is_set):
        events.append(event)
        if event.name == "token" and event.data["index"] == 3:
            stopped.set()
    assert len(by_name(events, "token")) == 7  # of the side that had its turn the fourth, of the other three
    assert [e.data["reason"] for e in by_name(events, "end")] == ["stopped", "stopped"]
    assert count_hooks(engine.lm.model) == 0


def test_the_plain_text_of_a_prompt_is_written_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(engine, asked([FEATURE], "One day", max_new_tokens=6))
    streams: list[Any] = []
    stream = engine.lm.stream
    monkeypatch.setattr(engine.lm, "stream", lambda *given, **how: streams.append(given) or stream(*given, **how))
    second = run(engine, asked([SECOND], "One day", max_new_tokens=6))
    assert len(streams) == 1
    plain = [[e for e in events if e.data["side"] == "plain"] for events in (first, second)]
    assert [e.data for e in plain[0][:-1]] == [e.data for e in plain[1][:-1]]
    assert texts(first)["plain"] == texts(second)["plain"]
    for other in (
        asked([], "One day", max_new_tokens=7), asked([], "One night", max_new_tokens=6),
        asked([], "One day", max_new_tokens=6, temperature=0.5), asked([], "One day", max_new_tokens=6, seed=1),
    ):  # fmt: skip
        before = len(streams)
        run(engine, other, ["plain"])
        assert len(streams) == before + 1


def test_recipes_go_round_and_open_in_the_command_line(engine: Engine, tmp_path: Path) -> None:
    state = state_from({**asked(CASES["all"], temperature=0.5, seed=3).record(), "watch": [1, 2]})
    text = sharing.recipe_of(engine, state).to_yaml(sharing.Elsewhere())
    assert sharing.state_of(engine, Recipe.parse(text, "r", sharing.Elsewhere())) == state
    (tmp_path / "recipe.yaml").write_text(text)
    with Recipe.load(tmp_path / "recipe.yaml").apply(engine.lm):
        sampled = {"do_sample": True, "temperature": 0.5, "seed": 3}
        made = engine.lm.generate(PROMPT, max_new_tokens=8, **sampled).completions[0]
    assert made == texts(run(engine, state))["steered"]


SAE_LINE = "features: {sae: SAE, ids: {3: 1.0}"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (f"{SAE_LINE}}}, gate: 0.5", "a gate"),
        (f"{SAE_LINE}}}, target_kl: 0.5", "a target_kl"),
        (f"{SAE_LINE}, mode: clamp}}, scale: 2", "scales mode 'clamp'"),
        ("features: {sae: other, ids: {3: 1.0}}", "the SAE 'other'"),
        ("vector: /etc/passwd", "not loaded"),
        ("direction: {sae: SAE, feature: 3}", "a direction"),
        ("features: {sae: SAE, ids: {99999: 1.0}}", "out of range"),
        ("features: {sae: SAE, ids: {3: .nan}}", "must be a number, got nan"),
        ("nonsense: 1", "unknown key"),
    ],
)
def test_recipes_that_the_panel_cannot_show_are_refused(engine: Engine, edit: str, says: str) -> None:
    text = f"edits: [{{{edit.replace('SAE', json.dumps(engine.sae_source))}}}]"
    with pytest.raises(SteersmanError, match=says):
        engine.check(sharing.state_of(engine, Recipe.parse(text, "the recipe", sharing.Elsewhere())))


def test_the_catalogue_finds_features(engine: Engine, folder: Path) -> None:
    catalogue = Catalogue(engine, folder / "sae" / "features.json")
    found, total = catalogue.search("weather")
    assert ([one["id"] for one in found], total) == ([3, 5], 2)  # by its label, then by a token
    assert found[0]["label"] == "foggy <b>weather</b>"
    assert catalogue.search("7")[0][0]["id"] == 7
    assert catalogue.search("", limit=3, offset=30, sort="id")[0][0]["id"] == 30
    assert catalogue.search()[0][-1]["id"] == 9
    full = catalogue.full(9)
    assert full["dead"]
    assert len(full["promotes"]) == len(full["suppresses"]) == 8
    cosines = torch.nn.functional.cosine_similarity(engine.sae.W_dec[9], engine.sae.W_dec, dim=1)
    cosines[9] = -1
    assert full["neighbours"][0]["id"] == int(cosines.argmax())
    wrong: list[dict[str, Any]] = [{"sort": "size"}, {"limit": 0}, {"limit": 10**6}, {"offset": -1}]
    for bad in wrong:
        with pytest.raises(SteersmanError):
            catalogue.search("", **bad)
    (folder / "wrong.json").write_text('[{"id": 999, "contexts": [3]}]')
    with pytest.raises(SteersmanError, match=r"wrong\.json"):
        Catalogue(engine, folder / "wrong.json")


def test_what_a_text_activates(engine: Engine) -> None:
    states = engine.lm.capture(engine.encode(PROMPT), hooks=HOOK)[HOOK][0, 1:]
    code = engine.sae.encode(states)
    found = panels.activating(engine, PROMPT, 3)["features"]
    assert [one["id"] for one in found] == code.max(0).values.topk(3).indices.tolist()
    assert found[0]["value"] == pytest.approx(float(code.max()), rel=1e-4)
    tokens = panels.activations(engine, PROMPT, [3], 2)["tokens"]
    assert [len(token["features"]) for token in tokens] == [0] + [3] * (len(tokens) - 1)


def test_dose_target_and_decomposition(engine: Engine) -> None:
    found = panels.dose(engine, asked([FEATURE, VECTOR]), 1, [0.0, 1.5], lambda: False)
    assert found is not None
    rows, figure = found
    assert rows[1]["text"] == texts(run(engine, asked([FEATURE, VECTOR])))["steered"]
    assert rows[0]["text"] == texts(run(engine, asked([FEATURE])))["steered"]
    assert rows[1]["activation"] is None
    assert 0 <= rows[0]["kl"] < rows[1]["kl"]
    assert len(figure.axes) == 2
    (alone,) = panels.dose(engine, asked([FEATURE]), 0, [0.0], lambda: False)[0]  # pyright: ignore[reportOptionalSubscript]
    assert alone["kl"] == pytest.approx(0, abs=1e-5)
    assert panels.dose(engine, asked([FEATURE]), 0, [0.0], lambda: True) is None

    made = panels.target(engine, {3: 1.0, 4: -0.5})
    assert engine.effects is not None
    expected = engine.effects.solve({3: 1.0, 4: -0.5})
    name = made["vector"]["name"]
    assert torch.equal(engine.vector(name).vector.vector, expected.vector)
    assert made["rows"][0]["predicted"] == pytest.approx(float(engine.effects.predict(expected)[3]), rel=1e-5)
    assert not {3, 4} & {one["id"] for one in made["others"]}
    with pytest.raises(SteersmanError, match="out of range"):
        panels.target(engine, {10**9: 1.0})
    many = {j: 0.1 * j for j in range(10, 25)}
    names = [panels.target(engine, {**many, 10: weight})["vector"]["name"] for weight in (1.0, 1.5, 1.0)]
    assert names[0] == names[2] != names[1]
    assert len(names[0]) < 60

    found, _ = panels.taken_apart(engine, SteeringVector.of_feature(engine.sae, 11), "omp", 4)
    assert found["rows"][0]["id"] == 11
    assert found["explained_variance"] == pytest.approx(1, abs=1e-4)


def test_a_vector_that_was_made_here_is_made_again_by_what_is_copied(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = panels.target(engine, {5: 2.0})["vector"]["name"]
    state = asked([{"kind": "vector", "name": name, "strength": 30.0}])
    found = texts(run(engine, state))["steered"]
    assert printed_by(sharing.python_of(engine, state), capsys) == found
    command = sharing.command_of(engine, state)
    assert command is not None
    assert by_command(command, capsys)["pairs"][0]["steered"] == found
    assert sharing.files_of(engine, state) == [name]
    assert (tmp_path / f"{name}.safetensors").is_file()
    recipe = Recipe.parse(sharing.recipe_of(engine, state).to_yaml(sharing.Elsewhere()), "r", sharing.Elsewhere())
    assert sharing.state_of(engine, recipe) == state


MISTAKES = [
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": 10**9}]}, r"interventions\[0\].*out of range"),
    (
        {"prompt": "a", "interventions": [{"kind": "feature", "id": 3, "strength": float("nan")}]},
        "must be a number, got nan",
    ),
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": 3, "strength": "2"}]}, "strength is '2'"),
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": 3, "strength": 1e308}]}, r"\[0\].*finite number"),
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": 3, "strength": 10**400}]}, "must be a number"),
    ({"prompt": "a", "interventions": [{"kind": "vector", "name": "calm", "strength": -1e308}]}, "must be finite"),
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": True}]}, "id is True"),
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": 9, "units": "max_act"}]}, "is dead"),
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": 3, "mode": "mirror"}]}, "mode 'mirror'"),
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": 3}, {"kind": "feature", "id": 3}]}, "turned twice"),
    ({"prompt": "a", "interventions": [{"kind": "vector", "name": "x"}]}, "no vector 'x'"),
    ({"prompt": "a", "interventions": [{"kind": "song"}]}, "kind must be one of"),
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": 3, "sacle": 1}]}, "unknown setting 'sacle'"),
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": 3, "scope": "1:2+" * 999}]}, "3,996 characters"),
    ({"prompt": "a", "interventions": {}}, "must be a list"),
    ({"prompt": "a", "interventions": [{"kind": "feature", "id": 3}] * 99}, "at most 16"),
    ({"prompt": "a", "generation": {"max_new_tokens": -1}}, "max_new_tokens"),
    ({"prompt": "a", "generation": {"max_new_tokens": 10**6}}, "max_new_tokens"),
    ({"prompt": "a", "generation": {"temperature": -1.0}}, "temperature"),
    ({"prompt": "a", "generation": {"top_p": 0.5}}, "top_p"),
    ({"prompt": "a", "generation": {"seed": 1 << 70}}, "seed"),
    ({"prompt": "a", "watch": [10**9]}, r"watch\[0\].*out of range"),
    ({"prompt": "a", "watch": ["x"]}, r"watch\[0\]"),
    ({"prompt": "a", "wacht": []}, "unknown field 'wacht'"),
    ({"prompt": "x" * 30_000}, "30,000 characters"),
    ({"prompt": "\ud800"}, "lone surrogate"),
    ({"prompt": 3}, "must be text"),
    ({"prompt": "a", "messages": []}, "either prompt or messages"),
    ({}, "either prompt or messages"),
    ({"messages": [{"role": "user"}]}, "list of messages"),
    ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "unknown field 'x'"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing to reply to"),
    ([], "must be an object"),
]


@pytest.mark.parametrize(("content", "says"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_names_its_field(engine: Engine, content: Any, says: str) -> None:
    with pytest.raises(SteersmanError, match=says):
        engine.check(state_from(content))


# The queue


def test_jobs_wait_their_turn_and_are_told_their_place() -> None:
    queue, go = JobQueue(most=2), threading.Event()
    told: dict[str, list[tuple[str, Any]]] = {name: [] for name in "abc"}
    ended = {name: threading.Event() for name in "abc"}

    def submit(name: str, work: Any) -> Job:
        def deliver(event: Event) -> None:
            told[name].append((event.name, event.data.get("ahead", event.data.get("message"))))
            if event.name in ("done", "error"):
                ended[name].set()

        return queue.submit(work, deliver)

    def slow(job: Job) -> Iterator[Event]:
        for _ in range(1000):
            yield Event("token", {})
            if go.wait(0.01) or job.stopped:
                return

    def wrong(_job: Job) -> Iterator[Event]:
        raise SteersmanError("a mistake\nin two lines")
        yield

    def broken(_job: Job) -> Iterator[Event]:
        raise RuntimeError
        yield

    first = submit("a", slow)
    while queue.counts() != (True, 0):
        pass
    second, _ = submit("b", wrong), submit("c", broken)
    with pytest.raises(FullError, match="2 requests are waiting"):
        submit("a", slow)
    assert not queue.stop("nobody's")
    assert queue.stop(first.id)
    assert all(ended[name].wait(5) for name in "abc")
    assert told["a"][-1] == ("done", None)
    assert told["b"] == [
        ("queued", 1), ("queued", 0), ("start", None), ("error", "a mistake in two lines"),
    ]  # fmt: skip
    assert [ahead for name, ahead in told["c"] if name == "queued"] == [2, 1, 0]
    assert told["c"][-1][0] == "error"
    assert "RuntimeError" in told["c"][-1][1]

    running = submit("a", slow)
    while queue.counts() != (True, 0):
        pass
    heard = len(told["b"])
    gone = submit("b", slow)
    queue.drop(gone)
    queue.drop(running)
    assert told["b"][heard:] == [("queued", 1)]  # whoever left hears no more, and does not begin
    assert second.id != gone.id
    queue.close()
    queue.join(5)
    with pytest.raises(FullError, match="stopping"):
        submit("a", slow)
