"""A stand-in for the playground's server: the same API, with answers that a test chooses and no model behind them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

PACKAGE = Path(__file__).parents[2] / "steersman"
PAGE, STYLES = PACKAGE / "ui" / "playground" / "page", PACKAGE / "templates"
CSP = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>\u202eevil\x1b[2J\x07 שלום مرحبا 👩‍🚀'
WORDS = ["Once", " upon", " a", " time", ",", " snow", " fell", " on", " the", " town", ".", "\n", HOSTILE, " end"]
SVG = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 72 30'><path d='M2 28 L70 4' stroke='#1f77b4'/></svg>"
LABELS = {0: HOSTILE, 1: "snow and cold", 2: "names"}
HOOK = "blocks.2.hook_resid_post"
UNITS = ["raw", "max_act", "norm_frac"]


def named(i: int, **more: Any) -> dict[str, Any]:
    return {"id": i, "label": LABELS.get(i, ""), **more}


def feature(i: int) -> dict[str, Any]:
    tokens = {"fires_on": [" snow", HOSTILE], "promotes": [" cold"]}
    return named(i, density=0.001 * (i + 1), max_act=4.0 + i, dead=i == 7, **tokens)


def vector(name: str, made: bool = False) -> dict[str, Any]:
    return {"name": name, "hooks": [HOOK], "norm": 3.2, "method": "caa", "made": made}


def activations(*values: tuple[int, float]) -> list[dict[str, Any]]:
    return [named(i, value=value, watched=True) for i, value in values]


def full(i: int) -> dict[str, Any]:
    context = {"before": "Then ", "token": HOSTILE, "after": " fell", "activation": 3.0}
    more = {"suppresses": [" hot"], "typical_act": 1.0, "source": "test", "contexts": [context]}
    return {**feature(i), **more, "neighbours": [named(0, cosine=0.5)]}


def figure(name: str, alt: str) -> dict[str, str]:
    return {"src": f"/api/figures/{name}.svg", "alt": alt}


def refusal(state: dict[str, Any]) -> str:
    for at, one in enumerate(state.get("interventions", [])):
        if abs(one["strength"]) > 1000:
            return f"state.interventions[{at}].strength must be at most 1000"
    if state.get("generation", {}).get("max_new_tokens", 1) < 1:
        return "state.generation.max_new_tokens must be from 1 to 100, got -5"
    return ""


class StandIn:
    """What the stand-in was asked, and how it answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        self.asked.clear()
        self.hold: int | str = ""
        self.fail = ""
        self.words: dict[str, list[str]] = {"steered": WORDS, "plain": WORDS}
        self.stopped: set[str] = set()
        self.effects = True

    def asked_last(self, path: str) -> Any:
        return [body for asked, body in self.asked if asked == path][-1]

    def about(self) -> dict[str, Any]:
        modes = [{"name": name, "units": UNITS, "about": ""} for name in ("add", "clamp", "floor", "cap")]
        modes += [{"name": name, "units": ["raw"], "about": ""} for name in ("scale", "project_out")]
        scopes = [
            {"name": name, "about": "", "chat": name == "assistant"} for name in ("generation", "all", "assistant")
        ]
        limits = {"max_new_tokens": 100, "prompt_chars": 2000, "features": 4, "watch": 4, "dose_strengths": 9, "top": 3}
        generation = {"max_new_tokens": 14, "temperature": 0.0, "top_p": None, "seed": 0}
        defaults = {"mode": "add", "units": "max_act", "scope": "generation", "strength": 1.0, "strengths": [0, 0.5, 1]}
        return {
            "version": "0", "model": "stand-in", "hook": HOOK, "sae": "/stand-in", "d_sae": 100, "n_labels": 3,
            "has_stats": True, "context_length": 512, "chat": True, "chat_reason": "", "units": UNITS, "modes": modes,
            "scopes": scopes, "vectors": [vector(HOSTILE)], "effects": self.effects, "limits": limits,
            "decompose_methods": ["encode", "omp"], "defaults": {**defaults, "generation": generation}, "recipe": None,
        }  # fmt: skip

    async def generate(self, body: dict[str, Any]) -> AsyncIterator[str]:
        job = f"job{len(self.asked)}"

        def event(name: str, **data: Any) -> str:
            return f"event: {name}\ndata: {json.dumps({'job': job, **data})}\n\n"

        yield event("queued", ahead=1)
        await self._held("queue", job)
        yield event("queued", ahead=0) + ": still here\n\n" + event("start")
        if self.fail:
            yield event("error", message=self.fail)
            return
        for side in body["sides"]:
            read = {"text": "Hi", "id": 5, "special": False, "features": activations((1, 2.0))}
            yield event("prompt", side=side, tokens=[read])
        length = body["state"]["generation"]["max_new_tokens"]
        made = dict.fromkeys(body["sides"], 0)
        for index in range(length):
            await self._held(index, job)
            if job in self.stopped:
                break
            for side in body["sides"]:
                if index < len(self.words[side]):
                    features = activations((1, index / 3), (0, 1.0 if index == 3 else 0))
                    yield event("token", side=side, index=index, id=index, text=self.words[side][index])
                    yield event("features", side=side, index=index, features=features)
                    made[side] += 1
        for side, count in made.items():
            reason = "stopped" if job in self.stopped else "length" if count == length else "stop"
            text = "".join(self.words[side][:count])
            yield event("end", side=side, reason=reason, text=text, tokens_per_second=9.5)
        yield event("done")

    async def _held(self, here: int | str, job: str) -> None:
        """Waits while a test holds jobs in the queue, or before a token, unless the job is stopped."""
        while self.hold == here and job not in self.stopped:
            await asyncio.sleep(0.01)

    def find(self, query: dict[str, str]) -> dict[str, Any]:
        found = [feature(i) for i in range(20) if query.get("q", "") in f"{i} {LABELS.get(i, '')}"]
        return {"features": found, "total": len(found)}

    def dose(self, strengths: list[float]) -> dict[str, Any]:
        same = {"repetition": 0.0, "distinct_2": 1.0, "text": HOSTILE}
        rows = [{"strength": s, "kl": s, "nll": 2 + s, "activation": 3 * s, **same} for s in strengths]
        return {"figure": figure("dose", "KL and loss over strength"), "rows": rows}

    def decompose(self, method: str) -> dict[str, Any]:
        rows = [named(0, coefficient=1.5, strength=0.3, cosine=0.7, density=0.01)]
        told = {"method": method, "explained_variance": 0.8, "cosine": 0.9, "warnings": [HOSTILE]}
        return {**told, "rows": rows, "figure": figure("apart", "explained variance")}

    def target(self) -> dict[str, Any]:
        rows = [named(1, weight=1.0, predicted=0.9, signal=4.2)]
        return {"vector": vector("target-1", True), "scale": 2.0, "rows": rows, "others": [named(0, predicted=0.1)]}

    def load(self) -> dict[str, Any]:
        one = {"kind": "feature", "id": 2, "strength": 2.5, "mode": "clamp", "units": "raw", "scope": "all"}
        return {"state": {"prompt": HOSTILE, "interventions": [{**one, "include_bos": False}]}}

    def answer(self, path: str, body: dict[str, Any], query: dict[str, str]) -> Any:
        if path.startswith("features/"):
            return full(int(path.split("/")[1]))
        here = named(1, value=3.5, mean=1.0, count=2, token=" snow")
        answers: dict[str, Any] = {
            "about": self.about,
            "features": lambda: self.find(query),
            "activating": lambda: {"features": [here]},
            "dose": lambda: self.dose(body["strengths"]),
            "target": self.target,
            "decompose": lambda: self.decompose(body["method"]),
            "code": lambda: {"python": f"# {HOSTILE}", "command": "steersman steer", "files": ["target-1"]},
            "recipe/save": lambda: {"recipe": "edits: []\n", "files": []},
            "recipe/load": self.load,
        }
        return answers[path]()

    async def api(self, request: Request) -> Response:
        from starlette.responses import JSONResponse, Response, StreamingResponse

        path = request.path_params["path"]
        body = await request.json() if request.method == "POST" else {}
        self.asked.append((path, body))
        if path.startswith("figures/"):
            return Response(SVG, media_type="image/svg+xml")
        if path == "stop":
            self.stopped.add(body["job"])
            return JSONResponse({"stopped": True})
        if wrong := refusal(body.get("state", {})):
            return JSONResponse({"error": wrong}, 400)
        if path == "generate":
            return StreamingResponse(self.generate(body), media_type="text/event-stream")
        return JSONResponse(self.answer(path, body, dict(request.query_params)))

    async def page(self, request: Request) -> Response:
        from starlette.responses import FileResponse, HTMLResponse, Response

        from steersman.html import render

        name = request.path_params.get("name")
        if name == "favicon.ico":
            return Response(status_code=204)
        if name is not None:
            return FileResponse((STYLES if name == "base.css" else PAGE) / name)
        page = render("playground.html", PAGE, title="Steersman", version="0")
        return HTMLResponse(page, headers={"Content-Security-Policy": CSP})


@contextmanager
def standing_in() -> Iterator[tuple[StandIn, str]]:
    """The stand-in and its address, while it runs."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Route

    stand_in = StandIn()
    pages = [Route(path, stand_in.page) for path in ("/", "/assets/{name}", "/{name:str}")]
    routes = [Route("/api/{path:path}", stand_in.api, methods=["GET", "POST"]), *pages]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield stand_in, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(5)
