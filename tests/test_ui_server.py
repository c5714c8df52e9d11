"""The playground's server: who may ask, what mistakes become, and two users at once, over a real port."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import fails
from support.playground import HOOK, PROMPT, demo_sae, served

from steersman.demo import MODEL_PATH
from steersman.lm import LanguageModel
from steersman.sae import SAE, FeatureLabel, FeatureLabels
from steersman.steer import Steerer, SteeringVector

httpx = pytest.importorskip("httpx", reason="no httpx: the playground's server is not tested")
pytest.importorskip("uvicorn", reason="no uvicorn (extra ui): the playground's server is not tested")
pytest.importorskip("starlette", reason="no starlette (extra ui): the playground's server is not tested")

from starlette.testclient import TestClient  # noqa: E402

from steersman.commands.ui import UiCommand, loaded  # noqa: E402
from steersman.ui.playground.app import Playground  # noqa: E402
from steersman.ui.playground.security import CSP, MAX_BODY  # noqa: E402
from steersman.ui.playground.serving import address, bound, token_for  # noqa: E402


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_sae(tmp_path_factory.mktemp("ui") / "sae")


@pytest.fixture(scope="module")
def playground(sae_folder: Path) -> Playground:
    return loaded(UiCommand(model=str(MODEL_PATH), sae=str(sae_folder)))


@pytest.fixture(scope="module")
def url(playground: Playground) -> Iterator[str]:
    """A real server on a free port."""
    with served(playground) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with httpx.Client(base_url=url, timeout=60) as made:
        yield made


def asked(feature: int, strength: float, n: int = 10, **more: Any) -> dict[str, Any]:
    dial = {"kind": "feature", "id": feature, "strength": strength, "scope": "all"}
    return {"prompt": PROMPT, "interventions": [dial], "generation": {"max_new_tokens": n}, **more}


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for part in text.split("\n\n"):
        if part and not part.startswith(":"):
            name, data = part.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def generate(client: Any, state: dict[str, Any], **more: Any) -> list[tuple[str, dict[str, Any]]]:
    answer = client.post("/api/generate", json={"state": state, **more})
    assert answer.status_code == 200, answer.text
    return events_of(answer.text)


def texts(events: list[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    return {data["side"]: data["text"] for name, data in events if name == "end"}


def test_users_at_once_get_what_each_asked_for(client: Any, url: str, sae_folder: Path) -> None:
    lm, sae = LanguageModel.load(str(MODEL_PATH)), SAE.load(sae_folder)
    wanted = [(3, 40.0), (11, -40.0), (20, 30.0), (7, 25.0)]

    def user(one: tuple[int, float]) -> list[tuple[str, dict[str, Any]]]:
        with httpx.Client(base_url=url, timeout=60) as mine:
            return generate(mine, asked(*one))

    with ThreadPoolExecutor(len(wanted)) as pool:
        found = list(pool.map(user, wanted))
    plain = lm.generate(PROMPT, max_new_tokens=10).completions[0]
    steered = []
    for feature, strength in wanted:
        with Steerer(lm).features(sae, {feature: strength}, scope="all"):
            steered.append(lm.generate(PROMPT, max_new_tokens=10).completions[0])
    assert len(set(steered)) == len(wanted)
    assert [texts(events) for events in found] == [{"steered": one, "plain": plain} for one in steered]
    for events in found:
        names = [name for name, _ in events]
        assert names[0] == "queued"
        assert names[-1] == "done"
        assert {"start", "prompt", "token", "features", "end"} <= set(names)
    assert max(data["ahead"] for events in found for name, data in events if name == "queued") >= 1


def test_mistakes_are_one_line_and_the_server_stays(client: Any) -> None:
    large = {"state": {"prompt": "x" * 1_000_000}}
    wrong: list[tuple[str, Any, int, str]] = [
        ("/api/generate", large, 413, "larger than 256 kB"),
        ("/api/generate", {"state": {"prompt": "x" * 30_000}}, 400, "30,000 characters"),
        ("/api/generate", {"state": asked(10**9, 1.0)}, 400, "out of range"),
        ("/api/generate", {"state": asked(3, 1.0, n=-5)}, 400, "max_new_tokens"),
        ("/api/generate", {"state": asked(3, 1.0, n=10**9)}, 400, "max_new_tokens"),
        ("/api/generate", {"state": asked(3, 1.0), "sides": ["left"]}, 400, "sides"),
        ("/api/generate", {"state": asked(3, 1.0), "side": 1}, 400, "unknown field 'side'"),
        ("/api/generate", {"state": {"messages": [{"role": "user", "content": "hi"}]}}, 400, "no chat template"),
        ("/api/activating", {"messages": [{"role": "user", "content": "hi"}]}, 409, "no chat template"),
        ("/api/target", {"features": {"3": 1.0}}, 409, "no effect map"),
        ("/api/target", {"features": {"x": 1.0}}, 400, "whole number"),
        ("/api/dose", {"state": asked(3, 1.0), "intervention": 4, "strengths": [1]}, 400, "intervention is 4"),
        ("/api/dose", {"state": asked(3, 1.0), "intervention": 0, "strengths": [1] * 40}, 400, "at most 9"),
        ("/api/decompose", {"feature": 10**9}, 400, "out of range"),
        ("/api/decompose", {"vector": "none"}, 400, "no vector 'none'"),
        ("/api/decompose", {"feature": 3, "method": "contrast"}, 400, "method must be one of"),
        ("/api/decompose", {"feature": 3, "k": 10**9}, 400, "out of range"),
        ("/api/recipe/load", {"text": "edits: [{vector: /etc/passwd}]"}, 400, "not loaded"),
        ("/api/recipe/save", {"state": {"prompt": "a"}}, 400, "nothing to steer by"),
        ("/api/nothing", {}, 404, "nothing here"),
        ("/api/about", {}, 405, "another method"),
    ]
    for path, content, status, says in wrong:
        answer = client.post(path, json=content)
        assert answer.status_code == status, (path, answer.text)
        assert set(answer.json()) == {"error"}
        assert says in answer.json()["error"], (path, answer.json())
        assert "\n" not in answer.json()["error"]
    for body, says in [
        (b'{"state": NaN}', "NaN"), (b"{", "not JSON"), (b"[" * 100_000, "nested"), (b"\xff", "not JSON"),
        (json.dumps({"state": asked(3, 1.0)}).replace("1.0", "1e999").encode(), "finite"),
    ]:  # fmt: skip
        answer = client.post("/api/generate", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert says in answer.json()["error"]
    assert client.get("/api/features/1000000000").status_code == 400
    assert client.get("/api/features?limit=nan").status_code == 400
    assert client.get("/assets/../state.py").status_code == 404
    assert client.get("/assets/%2e%2e%2fstate.py").status_code == 404
    too_long = generate(client, {"prompt": "word " * 3000})  # found when its turn comes, by the model's own tokens
    assert too_long[-1][0] == "error"
    assert "exceed the context" in too_long[-1][1]["message"]
    assert texts(generate(client, asked(3, 1.0, n=2)))["plain"]


def test_what_the_page_asks(client: Any) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-security-policy"] == CSP
    assert "<style" not in page.text
    assert client.get("/assets/base.css").headers["content-type"].startswith("text/css")
    about = client.get("/api/about").json()
    assert (about["model"], about["hook"], about["d_sae"]) == ("steersman-demo", HOOK, 32)
    assert about["units"] == ["raw"]
    assert not about["chat"]
    assert "no chat template" in about["chat_reason"]
    assert [one["id"] for one in client.get("/api/features?q=7").json()["features"]] == [7]
    assert client.get("/api/features/7").json()["neighbours"]
    dose = client.post("/api/dose", json={"state": asked(3, 9.0, n=3), "intervention": 0, "strengths": [0, 40]}).json()
    assert [row["strength"] for row in dose["rows"]] == [0, 40]
    figure = client.get(dose["figure"]["src"])
    assert figure.headers["content-type"] == "image/svg+xml"
    assert b"<svg" in figure.content
    assert client.get("/api/figures/none.svg").status_code == 404
    apart = client.post("/api/decompose", json={"feature": 5, "k": 3}).json()
    assert apart["rows"][0]["id"] == 5
    code = client.post("/api/code", json={"state": asked(3, 9.0)}).json()
    assert "steersman steer" in code["command"]
    assert "st.features(sae, {3: 9.0}" in code["python"]
    recipe = client.post("/api/recipe/save", json={"state": asked(3, 9.0)}).json()["recipe"]
    state = client.post("/api/recipe/load", json={"text": recipe}).json()["state"]
    assert state["interventions"][0]["id"] == 3
    assert state["prompt"] == PROMPT
    fired = client.post("/api/activating", json={"text": PROMPT, "limit": 2}).json()["features"]
    assert len(fired) == 2
    tokens = client.post("/api/activations", json={"text": PROMPT, "watch": [1]}).json()["tokens"]
    assert "".join(token["text"] for token in tokens if not token["special"]) == PROMPT


def test_a_vector_that_was_made_here_is_named_beside_the_code_and_can_be_fetched(
    client: Any, playground: Playground
) -> None:
    name = playground.engine.keep_vector(SteeringVector.of_feature(playground.engine.sae, 5), {5: 1.0})
    state = asked(3, 9.0)
    state["interventions"].append({"kind": "vector", "name": name, "strength": 2.0})
    assert client.post("/api/code", json={"state": state}).json()["files"] == [name]
    assert client.post("/api/recipe/save", json={"state": state}).json()["files"] == [name]
    assert client.get(f"/api/vectors/{name}.safetensors").status_code == 200


def test_it_starts_with_what_the_flags_name(sae_folder: Path, playground: Playground, tmp_path: Path) -> None:
    SteeringVector.of_feature(playground.engine.sae, 3).save(tmp_path / "calm.safetensors")
    SteeringVector.of_feature(playground.engine.sae, 4).save(tmp_path / "in_recipe.safetensors")
    FeatureLabels({2: FeatureLabel(text="fog")}).save(tmp_path / "labels.jsonl")
    (tmp_path / "recipe.yaml").write_text(
        f"scope: all\nedits:\n- features: {{sae: '{sae_folder}', ids: {{7: 2.0}}}}\n- vector: in_recipe.safetensors\n"
    )
    (tmp_path / "features.json").write_text('[{"id": 1, "fires_on": [" cat"]}]')
    given: dict[str, Any] = {name: str(tmp_path / file) for name, file in [
        ("labels", "labels.jsonl"), ("recipe", "recipe.yaml"), ("features", "features.json"),
    ]}  # fmt: skip
    config = UiCommand(
        model=str(MODEL_PATH), sae=str(sae_folder), vector=(str(tmp_path / "calm.safetensors"),), **given
    )
    with TestClient(loaded(config).app, base_url="http://127.0.0.1") as client:  # pyright: ignore[reportArgumentType]
        about = client.get("/api/about").json()
        assert [one["name"] for one in about["vectors"]] == ["calm", "in_recipe"]
        assert [one.get("id", one.get("name")) for one in about["recipe"]["interventions"]] == [7, "in_recipe"]
        assert about["n_labels"] == 1
        assert [one["id"] for one in client.get("/api/features?q=fog").json()["features"]] == [2]
        assert [one["id"] for one in client.get("/api/features?q=CAT").json()["features"]] == [1]
        (tmp_path / "back.safetensors").write_bytes(client.get("/api/vectors/calm.safetensors").content)
        assert client.get("/api/vectors/none.safetensors").status_code == 404
    back, calm = (SteeringVector.load(tmp_path / f"{name}.safetensors") for name in ("back", "calm"))
    assert torch.equal(back.vector, calm.vector)


def test_a_job_is_stopped_and_one_whose_user_left_is_dropped(client: Any, playground: Playground) -> None:
    running = {"state": {**asked(3, 1.0, n=150), "generation": {"max_new_tokens": 150}}, "sides": ["steered"]}
    with client.stream("POST", "/api/generate", json=running) as answer:
        lines, seen = answer.iter_lines(), []
        for line in lines:
            seen.append(line)
            if line == "event: token":
                break
        job = json.loads(next(one for one in seen if one.startswith("data: "))[6:])["job"]
        assert client.get("/api/queue").json()["running"]
        assert client.post("/api/stop", json={"job": job}).json() == {"stopped": True}
        rest = "\n".join(lines)
    assert '"reason": "stopped"' in rest
    assert "event: done" in rest
    assert client.post("/api/stop", json={"job": job}).json() == {"stopped": False}
    with client.stream("POST", "/api/generate", json=running) as answer:
        next(answer.iter_lines())
    waits_for(lambda: playground.queue.counts() == (False, 0))


def test_a_panel_whose_user_left_is_dropped(
    client: Any, playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def endless(*_given: Any) -> None:
        stopped = _given[-1]
        while not stopped():
            time.sleep(0.01)
        ended.set()

    monkeypatch.setattr("steersman.ui.playground.panels.dose", endless)
    asks = {"state": asked(3, 1.0), "intervention": 0, "strengths": [1]}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/api/dose", json=asks, timeout=0.3)
    assert ended.wait(10)
    waits_for(lambda: playground.queue.counts() == (False, 0))


def waits_for(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# Who may ask


def as_seen(playground: Playground, host: str, token: str | None) -> Any:
    """A client of a server that is bound to `host`."""
    made = Playground(playground.engine, playground.catalogue, host=host, token=token)
    return TestClient(made.app, base_url="http://127.0.0.1:8421")  # pyright: ignore[reportArgumentType]


def test_other_sites_and_names_are_refused(playground: Playground) -> None:
    local = as_seen(playground, "127.0.0.1", None)
    for host in ("127.0.0.1:8421", "localhost:9000", "[::1]:8421", "LOCALHOST", "127.0.0.2"):
        assert local.get("/api/queue", headers={"host": host}).status_code == 200, host
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "192.168.0.7:8421",
        "localhost.evil.example",
        "",
        "[",
        "a@b",
    ):
        assert local.get("/api/queue", headers={"host": host}).status_code == 403, host
    own = {"host": "localhost:8421", "origin": "http://localhost:8421"}
    assert local.post("/api/stop", json={"job": "x"}, headers=own).status_code == 200
    for origin in ("http://evil.example", "http://localhost:1", "null", "http://localhost:8421.evil.example"):
        assert local.post("/api/stop", json={"job": "x"}, headers={**own, "origin": origin}).status_code == 403, origin
        assert local.get("/api/about", headers={**own, "origin": origin}).status_code == 403
    across = {"sec-fetch-site": "cross-site"}
    assert local.get("/api/about", headers=across).status_code == 403
    assert local.get("/", headers=across).status_code == 200  # a link to the page is no harm
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = local.post("/api/stop", content=b'{"job": "x"}', headers={"content-type": kind})
        assert answer.status_code == 415, kind
    chunks = iter([b" " * (MAX_BODY // 2)] * 3)
    assert local.post("/api/stop", content=chunks, headers={"content-type": "application/json"}).status_code == 413


def test_beyond_this_machine_only_with_the_token(playground: Playground) -> None:
    assert token_for("127.0.0.1") is None
    assert token_for("::1") is None
    assert token_for("127.0.0.1", always=True)
    token = token_for("0.0.0.0")
    assert token is not None
    assert len(token) > 40
    assert token_for("0.0.0.0") != token
    with bound("0.0.0.0", 0) as opened:
        port = opened.getsockname()[1]
        assert address("0.0.0.0", opened, token) == f"http://{socket.gethostname()}:{port}/?token={token}"
        assert address("::1", opened, None) == f"http://[::1]:{port}/"
    away = as_seen(playground, "0.0.0.0", token)
    for path, headers in [
        ("/", {}), ("/?token=", {}), (f"/?token={token[:-1]}", {}), (f"/api/queue?token={token}", {}),
        ("/api/about", {}), ("/assets/base.css", {}), ("/api/queue", {"authorization": f"Bearer {token}x"}),
        ("/api/queue", {"authorization": token}), ("/api/queue", {"cookie": "steersman_token=wrong; a=\x01"}),
    ]:  # fmt: skip
        answer = away.get(path, headers=headers)
        assert answer.status_code == 401, path
        assert token not in answer.text
    assert away.post("/api/stop", json={"job": "x"}).status_code == 401
    assert away.get("/api/queue", headers={"authorization": f"Bearer {token}"}).status_code == 200
    page = away.get(f"/?token={token}")
    assert page.status_code == 200
    assert token not in page.text
    cookie = page.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert away.get("/api/about").status_code == 200  # the cookie is sent back
    assert away.get("/api/about", headers={"host": "10.0.0.3:8421"}).status_code == 200
    assert away.get("/api/about", headers={"host": socket.gethostname()}).status_code == 200
    assert away.get("/api/about", headers={"host": "evil.example"}).status_code == 403
    assert away.get("/api/about", headers={"origin": "http://evil.example"}).status_code == 403


# The command


def test_a_port_in_use_and_a_missing_package_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ["ui", "--model", "m", "--sae", "s"]
    with bound("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is in use" in fails(capsys, *needs, "--port", port)
    assert "between 0" in fails(capsys, *needs, "--port", "70000")
    assert "no address of this machine" in fails(capsys, *needs, "--host", "no such host")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs starlette: install the extra ui" in fails(capsys, *needs)


def test_ctrl_c_ends_the_server_in_the_middle_of_a_request(sae_folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "steersman",
        "ui",
        "--model",
        str(MODEL_PATH),
        "--sae",
        str(sae_folder),
        "--port",
        "0",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        line = server.stdout.readline()
        assert line.startswith("playground: http://127.0.0.1:"), line + server.stderr.read()
        url = line.split()[1]
        state = asked(3, 1.0, generation={"max_new_tokens": 150})
        with httpx.stream("POST", f"{url}api/generate", json={"state": state}, timeout=30) as answer:
            lines = answer.iter_lines()
            assert "event: start" in (next(lines), next(lines), next(lines), next(lines))
            server.send_signal(signal.SIGINT)
            assert "event: done" in list(lines)
        assert server.wait(60) == 0
        assert server.stderr.read() == f"loading {MODEL_PATH} and {sae_folder}\n"
