"""The routes: what a browser asks, as questions to the engine. Needs the extra `ui` (Starlette, uvicorn).

Whatever runs the model goes through the queue: `/api/generate` as a stream of events, the panels as one answer. A
mistake is one line in `{"error": ...}`; whatever else goes wrong ends that request alone.
"""

import asyncio
import io
import re
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from steersman import html
from steersman.conversations import is_conversation
from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.steer import SteeringVector
from steersman.steer.edits.feature import feature_rows
from steersman.steer.recipe import Recipe
from steersman.ui.playground import panels, sharing
from steersman.ui.playground import state as states
from steersman.ui.playground.about import about
from steersman.ui.playground.answers import EventStream, Listening, first_of, json_of, left, told
from steersman.ui.playground.catalogue import Catalogue
from steersman.ui.playground.engine import SIDES, TOP, Engine
from steersman.ui.playground.queue import Event, FullError, Job, JobQueue
from steersman.ui.playground.security import Guard
from steersman.ui.playground.state import State, fields_of, list_of, state_from, text_or_messages
from steersman.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Path(__file__).with_name("page")
ASSET = re.compile(r"[a-z0-9_-]{1,40}\.(js|css|svg)")
FIGURES = 64
"""Figures that are kept for the page to fetch."""

Answer = dict[str, Any]


class Playground:
    """The server's application: `app` is what an ASGI server runs."""

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue | None = None,
        *,
        start: State | None = None,
        host: str = "127.0.0.1",
        token: str | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        """`start` is the state to begin with; the rest as for `Guard`."""
        self.engine, self.catalogue, self.start = engine, catalogue or Catalogue(engine), start
        self.queue = JobQueue()
        self._figures: OrderedDict[str, bytes] = OrderedDict()
        gets = {
            "/": self.page,
            "/assets/{name}": self.asset,
            "/favicon.ico": self.icon,
            "/api/about": self.what,
            "/api/queue": self.waiting,
            "/api/features": self.features,
            "/api/features/{id}": self.feature,
            "/api/figures/{name}": self.figure,
            "/api/vectors/{name}": self.vector,
        }
        posts = {
            "/api/generate": self.generate,
            "/api/stop": self.stop,
            "/api/activating": self.activating,
            "/api/activations": self.activations,
            "/api/dose": self.dose,
            "/api/target": self.target,
            "/api/decompose": self.decompose,
            "/api/code": self.code,
            "/api/recipe/save": self.save_recipe,
            "/api/recipe/load": self.load_recipe,
        }
        routes = [Route(path, answer) for path, answer in gets.items()]
        routes += [Route(path, answer, methods=["POST"]) for path, answer in posts.items()]
        handlers = {
            FullError: lambda _r, error: told({"error": str(error)}, 503),
            panels.NotHereError: lambda _r, error: told({"error": str(error)}, 409),
            SteersmanError: lambda _r, error: told({"error": " ".join(str(error).split())}, 400),
            HTTPException: lambda _r, error: told({"error": _of_status(error)}, error.status_code),
            Exception: lambda _r, _e: told({"error": "this request failed; the server's log says more"}, 500),
        }
        inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        self.app = Guard(inner, host=host, token=token, names=names)  # pyright: ignore[reportArgumentType]

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """End what runs and waits."""
        self.queue.close()
        self.queue.join(10)

    # The page

    async def page(self, _request: Request) -> Response:
        title = f"Steersman: {self.engine.lm.name}"
        return HTMLResponse(html.render("playground.html", PAGE, title=title, version=__version__))

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        folder = html.FOLDER if name == "base.css" else PAGE
        if not ASSET.fullmatch(name) or not (folder / name).is_file():
            raise HTTPException(404)
        return FileResponse(folder / name)

    async def icon(self, _request: Request) -> Response:
        return Response(status_code=204)

    # What there is

    async def what(self, _request: Request) -> Response:
        return told(
            {**about(self.engine, self.queue.most), "recipe": None if self.start is None else self.start.record()}
        )

    async def waiting(self, _request: Request) -> Response:
        running, waiting = self.queue.counts()
        return told({"running": running, "waiting": waiting})

    async def features(self, request: Request) -> Response:
        query = request.query_params
        given = {name: _number(query[name], name) for name in ("limit", "offset") if name in query}
        words, sort = query.get("q", ""), query.get("sort", "match")
        if len(words) > 200:
            raise SteersmanError("q has more than 200 characters")
        found, total = await run_in_threadpool(self.catalogue.search, words, sort=sort, **given)
        return told({"features": found, "total": total})

    async def feature(self, request: Request) -> Response:
        feature = _number(request.path_params["id"], "a feature id")
        return told(await run_in_threadpool(self.catalogue.full, feature))

    async def figure(self, request: Request) -> Response:
        svg = self._figures.get(request.path_params["name"])
        if svg is None:
            raise HTTPException(404)
        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(svg, media_type="image/svg+xml", headers=policy)

    async def vector(self, request: Request) -> Response:
        name = request.path_params["name"]
        known = self.engine.vectors.get(name.removesuffix(".safetensors"))
        if known is None or not name.endswith(".safetensors"):
            raise HTTPException(404)
        content = await run_in_threadpool(_file_of, known.vector)
        download = {"content-disposition": "attachment"}
        return Response(content, media_type="application/octet-stream", headers=download)

    # Work for the model

    async def generate(self, request: Request) -> Any:
        held = fields_of(await json_of(request), ("state", "sides"), "the request")
        state = self._state(held)
        sides = list_of(held.get("sides", list(SIDES)), "sides", len(SIDES))
        if not sides or any(side not in SIDES for side in sides) or len(set(sides)) != len(sides):
            raise SteersmanError(f"sides must be one or both of {', '.join(SIDES)}")
        await run_in_threadpool(self.engine.check, state)
        work = lambda job: self.engine.generate(state, sides, lambda: job.stopped)  # noqa: E731
        return EventStream(Listening(self.queue, work))

    async def stop(self, request: Request) -> Response:
        held = fields_of(await json_of(request), ("job",), "the request")
        if not isinstance(held.get("job"), str):
            raise SteersmanError("job must be the id of a job")
        return told({"stopped": self.queue.stop(held["job"])})

    async def activating(self, request: Request) -> Response:
        held = fields_of(await json_of(request), ("text", "messages", "limit"), "the request")
        text, limit = self._text(held), whole_number(held.get("limit", 20), "limit", 1)

        def found(_job: Job) -> Answer:
            features = panels.activating(self.engine, text, min(limit, 200))["features"]
            return {"features": [{**self.catalogue.brief(one["id"]), **one} for one in features]}

        return await self._done(request, found)

    async def activations(self, request: Request) -> Response:
        held = fields_of(await json_of(request), ("text", "messages", "watch", "top"), "the request")
        text, top = self._text(held), whole_number(held.get("top", TOP), "top", 0)
        watch = [whole_number(j, "watch") for j in list_of(held.get("watch", []), "watch", states.WATCHED)]
        for feature in watch:
            self.engine.sae.check_feature(feature)
        return await self._done(request, lambda _job: panels.activations(self.engine, text, watch, min(top, 32)))

    async def dose(self, request: Request) -> Response:
        held = fields_of(await json_of(request), ("state", "intervention", "strengths"), "the request")
        state = self._state(held)
        index = whole_number(held.get("intervention"), "intervention", 0)
        if index >= len(state.interventions):
            raise SteersmanError(f"intervention is {index}, and the state has {len(state.interventions)}")
        strengths = panels.checked_strengths(list_of(held.get("strengths"), "strengths", panels.STRENGTHS))
        await run_in_threadpool(self.engine.check, state)

        def plotted(job: Job) -> Answer:
            found = panels.dose(self.engine, state, index, strengths, lambda: job.stopped)
            if found is None:
                raise SteersmanError("stopped")
            alt = f"Cost and response at {len(strengths)} strengths; the table has the figures"
            return {"rows": found[0], "figure": self._kept(found[1], alt)}

        return await self._done(request, plotted)

    async def target(self, request: Request) -> Response:
        held = fields_of(await json_of(request), ("features",), "the request")
        given = fields_of(held.get("features"), None, "features")
        if len(given) > states.INTERVENTIONS:
            raise SteersmanError(f"features has {len(given)} entries, and at most {states.INTERVENTIONS} are taken")
        weights = feature_rows({_number(j, "a feature id"): weight for j, weight in given.items()})[0]
        if self.engine.effects is None:
            panels.target(self.engine, weights)  # says so
        return await self._done(request, lambda _job: panels.target(self.engine, weights))

    async def decompose(self, request: Request) -> Response:
        held = fields_of(await json_of(request), ("vector", "feature", "method", "k"), "the request")
        method, k = held.get("method", "omp"), whole_number(held.get("k", 16), "k", 1)
        if (held.get("vector") is None) == (held.get("feature") is None):
            raise SteersmanError("the request needs either vector, a name, or feature, an id")
        if held.get("feature") is not None:
            feature = whole_number(held["feature"], "feature")
            what = SteeringVector.of_feature(self.engine.sae, feature, hook_name=self.engine.hook)
        else:
            what = self.engine.vector(str(held["vector"])).vector

        def apart(_job: Job) -> Answer:
            found, figure = panels.taken_apart(self.engine, what, method, k)
            alt = f"Explained variance against the number of features, up to {found['explained_variance']:.3f}"
            return {**found, "figure": self._kept(figure, alt)}

        return await self._done(request, apart)

    async def _done(self, request: Request, make: Callable[[Job], Answer]) -> Response:
        """What `make` gives when its turn in the queue comes; it is dropped where the asker leaves before."""

        def work(job: Job) -> Iterator[Event]:
            yield Event("result", make(job))

        listening = Listening(self.queue, work)
        gone = asyncio.ensure_future(left(request.receive))
        try:
            found = await first_of(self._result(listening), gone)
        finally:
            gone.cancel()
            listening.close()
        return Response(status_code=204) if found is None else found

    async def _result(self, listening: Listening) -> Response:
        result: Answer = {}
        async for event in listening.events():
            if event is not None and event.name == "result":
                result = event.data
            if event is not None and event.name == "error":
                return told({"error": event.data["message"]}, 400)
        return told(result) if result else told({"error": "stopped"}, 400)

    # To take along

    async def code(self, request: Request) -> Response:
        state = self._state(fields_of(await json_of(request), ("state",), "the request"))
        await run_in_threadpool(self.engine.check, state)
        python, command = sharing.python_of(self.engine, state), sharing.command_of(self.engine, state)
        return told({"python": python, "command": command, "files": sharing.files_of(self.engine, state)})

    async def save_recipe(self, request: Request) -> Response:
        state = self._state(fields_of(await json_of(request), ("state",), "the request"))
        await run_in_threadpool(self.engine.check, state)
        text = sharing.recipe_of(self.engine, state).to_yaml(sharing.Elsewhere())
        return told({"recipe": text, "files": sharing.files_of(self.engine, state)})

    async def load_recipe(self, request: Request) -> Response:
        held = fields_of(await json_of(request), ("text",), "the request")
        if not isinstance(held.get("text"), str):
            raise SteersmanError("text must be the text of a recipe")

        def read() -> State:
            recipe = Recipe.parse(held["text"], "the recipe", sharing.Elsewhere())
            state = sharing.state_of(self.engine, recipe)
            self.engine.check(state)
            return state

        return told({"state": (await run_in_threadpool(read)).record()})

    # Parts

    def _state(self, held: Mapping[str, Any]) -> State:
        return state_from(held.get("state"), units=self.engine.default_units)

    def _text(self, held: Mapping[str, Any]) -> Any:
        found = text_or_messages(held, "the request", ("text", "messages"))
        if is_conversation(found) and self.engine.no_chat:
            raise panels.NotHereError(self.engine.no_chat)
        return found

    def _kept(self, figure: "Figure", alt: str) -> Answer:
        """A figure as the page fetches it."""
        file = io.BytesIO()
        figure.savefig(file, format="svg")
        name = f"{secrets.token_urlsafe(9)}.svg"
        self._figures[name] = file.getvalue()
        while len(self._figures) > FIGURES:
            self._figures.popitem(last=False)
        return {"src": f"/api/figures/{name}", "alt": alt}


def _number(text: str, what: str) -> int:
    """A whole number from a URL or a key."""
    if not re.fullmatch(r"-?[0-9]{1,15}", text):
        raise SteersmanError(f"{what} must be a whole number, got {text[:40]!r}")
    return int(text)


def _of_status(error: HTTPException) -> str:
    words = {404: "there is nothing here by that name", 405: "this address takes another method"}
    return words.get(error.status_code, error.detail)


def _file_of(vector: SteeringVector) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        vector.save(Path(folder) / "vector.safetensors")
        return (Path(folder) / "vector.safetensors").read_bytes()
