"""A job of the queue as an answer over HTTP, and JSON both ways."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from steersman.errors import SteersmanError
from steersman.ui.playground.queue import LAST, Event, JobQueue, Work

KEEP_ALIVE = 10.0
"""Seconds between lines that say nothing, while nothing happens."""


class EventStream:
    """An ASGI answer that gives a job's events as server-sent events, and drops the job when its asker leaves."""

    def __init__(self, listening: "Listening") -> None:
        self.listening = listening

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.ensure_future(left(receive))
        try:
            await first_of(self._pump(send), gone)
        finally:
            gone.cancel()
            self.listening.close()

    async def _pump(self, send: Any) -> None:
        async for event in self.listening.events():
            text = ": waiting\n\n" if event is None else f"event: {event.name}\ndata: {as_json(event.data)}\n\n"
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Listening:
    """A job in the queue, and its events as this event loop hears them."""

    def __init__(self, queue: JobQueue, work: Work) -> None:
        self._queue, self._heard = queue, asyncio.Queue[Event]()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody listens any more
                loop.call_soon_threadsafe(self._heard.put_nowait, event)

        self.job = queue.submit(work, deliver)

    async def events(self) -> AsyncIterator[Event | None]:
        """Events as they come, up to the last; None where none came for a while."""
        while True:
            try:
                event = await asyncio.wait_for(self._heard.get(), KEEP_ALIVE)
            except TimeoutError:
                yield None
                continue
            yield event
            if event.name in LAST:
                return

    def close(self) -> None:
        """Drop the job, unless it has ended."""
        self._queue.drop(self.job)


async def left(receive: Any) -> None:
    """Wait until the asker has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(work: Any, gone: "asyncio.Future[None]") -> Any:
    """What `work` gives; None where its asker was gone first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()


def as_json(value: Any) -> str:
    """JSON as browsers read it: numbers that are not finite are null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def told(value: Any, status: int = 200) -> Response:
    return Response(as_json(value), status, media_type="application/json")


async def json_of(request: Request) -> Any:
    """The JSON of a request. Raises SteersmanError for what is none, and for NaN and Infinity."""

    def refuse(name: str) -> Any:
        raise SteersmanError(f"the request holds {name}, which is no number")

    try:
        return json.loads(await request.body(), parse_constant=refuse)
    except RecursionError:
        raise SteersmanError("the request is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, SteersmanError):
            raise
        raise SteersmanError("the request is not JSON") from None
