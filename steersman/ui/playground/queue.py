"""One model, many askers: jobs wait their turn in the order they came, and only one runs.

A job is a generator of events. Between any two of them it can be stopped, so whoever yields one event a token stops
within a token.
"""

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from steersman.errors import SteersmanError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Something that a job tells its asker."""

    name: str
    """What it is."""
    data: dict[str, Any]
    """What JSON can hold."""


LAST = ("done", "error")
"""Names of the events after which nothing more comes."""

Work = Callable[["Job"], Iterator[Event]]
"""What a job does, on the thread of the queue; it looks at `job.stopped` where it could go on for long."""


class FullError(SteersmanError):
    """As many jobs wait as may."""


class Job:
    """A piece of work that waits, runs or has ended. Its last event is `done` or `error`, whatever happens to it."""

    def __init__(self, work: Work, deliver: Callable[[Event], None]) -> None:
        self.id = secrets.token_urlsafe(9)
        self._work, self._deliver = work, deliver
        self._stop, self._dropped = threading.Event(), threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether it is to end where it stands."""
        return self._stop.is_set()

    def tell(self, name: str, **data: Any) -> None:
        """Give its asker an event, unless nobody listens any more."""
        if not self._dropped.is_set():
            self._deliver(Event(name, data))

    def run(self) -> None:
        """Do the work; whatever goes wrong is told and ends this job alone."""
        events = self._work(self)
        try:
            self.tell("start", job=self.id)
            for event in events:
                self.tell(event.name, **event.data)
                if self._dropped.is_set():
                    break
            self.tell("done", job=self.id)
        except SteersmanError as error:
            self.tell("error", message=" ".join(str(error).split()))
        except Exception as error:
            log.exception("a request failed")
            self.tell("error", message=f"this request failed ({type(error).__name__}); the server's log says more")
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()


class JobQueue:
    """Runs jobs one after the other on a thread of its own."""

    def __init__(self, most: int = 16) -> None:
        self.most = most
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="steersman-playground", daemon=True)
        self._thread.start()

    def submit(self, work: Work, deliver: Callable[[Event], None]) -> Job:
        """Put a job at the end; `deliver` is given its events, from this thread or the queue's. Raises FullError."""
        job = Job(work, deliver)
        with self._changed:
            if self._closed or len(self._waiting) >= self.most:
                why = "the server is stopping" if self._closed else f"{self.most} requests are waiting already"
                raise FullError(f"{why}: try again later")
            self._waiting.append(job)
            job.tell("queued", job=job.id, ahead=self._ahead(len(self._waiting) - 1))
            self._changed.notify_all()
        return job

    def stop(self, job_id: str) -> bool:
        """End a job where it stands: one that waits begins no more. Whether there was such a job."""
        with self._changed:
            job = next((one for one in (self._running, *self._waiting) if one is not None and one.id == job_id), None)
            if job is None:
                return False
            job._stop.set()
            if job in self._waiting:
                self._waiting.remove(job)
                job.tell("done", job=job.id)
                self._tell_places()
            return True

    def drop(self, job: Job) -> None:
        """Forget a job whose asker has left."""
        job._dropped.set()
        self.stop(job.id)

    def counts(self) -> tuple[bool, int]:
        """Whether a job runs, and how many wait."""
        with self._changed:
            return self._running is not None, len(self._waiting)

    def close(self) -> None:
        """End all jobs and take no more."""
        with self._changed:
            self._closed = True
            running = self._running
            for job in list(self._waiting):
                self.stop(job.id)
            if running is not None:
                running._stop.set()
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread of a closed queue."""
        self._thread.join(timeout)

    def _ahead(self, place: int) -> int:
        return place + (self._running is not None)

    def _tell_places(self) -> None:
        for place, job in enumerate(self._waiting):
            job.tell("queued", job=job.id, ahead=self._ahead(place))

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._running = self._waiting.popleft()
            try:
                self._running.run()
            finally:
                with self._changed:
                    self._running = None
                    self._tell_places()
