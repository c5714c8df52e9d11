"""A language model behind an OpenAI-compatible endpoint (`POST URL/chat/completions`), asked with patience.

What may pass, a full server (429, with its Retry-After), an error of the server's, a stall, an answer that is none, is
tried again, later and later. What cannot pass by itself, a wrong key, model or address, stops everything. The key comes
from an environment variable, goes to the host of the URL and nowhere else (no redirect is followed, no plain http to
another machine), and is in no message.
"""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from steersman.config import check_types, setting
from steersman.errors import SteersmanError

log = logging.getLogger(__name__)

__all__ = ["AnswerMissing", "EndpointRefused", "LabelEndpoint", "LabelEndpointConfig", "Messages"]

Messages = Sequence[Mapping[str, str]]
"""A conversation: `role` and `content` of each message."""
Ask = Callable[[Messages], str]
"""What answers a conversation: an `LabelEndpoint`, or a function of the user's."""

_LARGEST = 1 << 20
_QUOTED = 160
_LOCAL = ("localhost", "127.0.0.1", "::1")
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class AnswerMissing(SteersmanError):
    """One question that got no answer, after all tries; the next may get one."""


class EndpointRefused(SteersmanError):
    """The endpoint will answer no question as it is asked: the key, the model or the address is wrong."""


@dataclass(frozen=True, kw_only=True)
class LabelEndpointConfig:
    """Which model to ask, where, and with how much patience."""

    url: str
    """Base address, as https://api.openai.com/v1 or http://localhost:8000/v1."""
    model: str
    """Name of the model there."""
    key_variable: str = setting("STEERSMAN_LABEL_KEY", identity=False)
    """Environment variable with the key; without one none is sent."""
    timeout: float = setting(60.0, identity=False)
    """Seconds that one try may take in all."""
    retries: int = setting(4, identity=False)
    """Further tries of a question that failed for a reason that may pass."""
    max_wait: float = setting(60.0, identity=False)
    """Longest wait between two tries, in seconds; a server that asks for more is given up on."""
    max_requests: int = setting(1000, identity=False)
    """Requests sent, at most; further tries count."""
    max_tokens: int = 512
    """Tokens of one answer, at most."""

    def __post_init__(self) -> None:
        check_types(self)
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SteersmanError("the label endpoint is an address such as https://api.openai.com/v1")
        if parts.username is not None or parts.password is not None:
            raise SteersmanError(
                "the label endpoint's address holds a password: put the key in an environment variable"
            )
        if self.timeout <= 0 or self.max_wait < 0 or self.retries < 0 or self.max_tokens < 1 or self.max_requests < 1:
            raise SteersmanError("timeout, max_tokens and max_requests are above 0, retries and max_wait at least 0")


class LabelEndpoint:
    """Asks the model of a config. Callable from several threads; a context manager, which closes it."""

    def __init__(self, config: LabelEndpointConfig) -> None:
        """Raises SteersmanError for a key that cannot be sent, or would be sent in the clear to another machine."""
        import httpx  # here, as it takes a tenth of a second to load

        self.config = config
        self._key = os.environ.get(config.key_variable, "").strip()
        parts = urlsplit(config.url)
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise SteersmanError(f"the key in {config.key_variable} has characters that no key has")
        if self._key and parts.scheme == "http" and parts.hostname not in _LOCAL:
            raise SteersmanError(
                f"the key in {config.key_variable} would go to {parts.hostname} in the clear: use https, or unset it"
            )
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        self._url = parts._replace(path=path, fragment="").geturl()
        self._headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._httpx = httpx
        self._client = httpx.Client(follow_redirects=False, timeout=httpx.Timeout(config.timeout))
        self._guard, self._not_before = threading.Lock(), 0.0
        self._fields: dict[str, Any] = {"max_tokens": config.max_tokens, "temperature": 0}
        self._stopped = threading.Event()
        self.sent = 0

    def stop(self) -> None:
        """Let questions that wait for their next try fail at once, and send none any more."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections."""
        self.stop()
        self._client.close()

    def __enter__(self) -> "LabelEndpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, messages: Messages) -> str:
        """The answer to a conversation. Raises AnswerMissing or EndpointRefused."""
        reason = ""
        for attempt in range(self.config.retries + 1):
            self._wait_for_turn()
            wait: float | None = None
            try:
                status, headers, body = self._send(messages)
            except (self._httpx.HTTPError, TimeoutError, OSError) as error:
                reason = self._clean(f"{type(error).__name__}: {error}".rstrip(": "))
            else:
                if status == 200:
                    answer = _answer(body)
                    if answer is not None:
                        return answer
                    reason = f"an answer that holds none: {self._quoted(body)}"
                elif 300 <= status < 400:
                    target = urlsplit(headers.get("location", ""))
                    raise EndpointRefused(
                        f"the label endpoint sends on to {target.netloc or 'another address'}{target.path}; nothing "
                        "was sent there: give that address itself"
                    )
                elif status in _AGAIN:
                    reason, wait = f"HTTP {status}", _retry_after(headers.get("retry-after"))
                elif status == 400 and self._adapt(body):
                    reason, wait = "HTTP 400", 0.0
                elif status in (401, 403, 404, 405):
                    raise EndpointRefused(self._refusal(status, body))
                else:
                    raise AnswerMissing(f"HTTP {status}: {self._quoted(body)}")
            if wait is not None and wait > self.config.max_wait:
                raise AnswerMissing(f"{reason}: the server asks to wait {wait:.0f} s, more than max_wait")
            if attempt < self.config.retries:
                self._hold_back(wait, attempt, everybody=wait is not None)
        raise AnswerMissing(f"{reason} ({self.config.retries + 1} tries)")

    def _wait_for_turn(self) -> None:
        while True:
            with self._guard:
                left = self._not_before - time.monotonic()
                if self._stopped.is_set():
                    raise AnswerMissing("not asked: the run was stopped")
                if left <= 0:
                    if self.sent >= self.config.max_requests:
                        raise EndpointRefused(f"{self.sent} requests were sent, as many as max_requests allows")
                    self.sent += 1
                    return
            self._stopped.wait(left)

    def _hold_back(self, wait: float | None, attempt: int, everybody: bool) -> None:
        """Wait before the next try of a question: as long as the server asks, and then all questions do, or 1, 2, 4
        and so on seconds with some chance in it."""
        delay = wait if wait is not None else 2.0**attempt * (0.5 + random.random() / 2)
        delay = min(delay, self.config.max_wait)
        if everybody:
            with self._guard:
                self._not_before = max(self._not_before, time.monotonic() + delay)
        else:
            self._stopped.wait(delay)

    def _send(self, messages: Messages) -> tuple[int, Mapping[str, str], bytes]:
        deadline = time.monotonic() + self.config.timeout
        body = {"model": self.config.model, "messages": [dict(message) for message in messages], **self._fields}
        content = bytearray()
        with self._client.stream("POST", self._url, json=body, headers=self._headers) as response:
            for part in response.iter_bytes():
                content += part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {self.config.timeout:g} s")
                if len(content) > _LARGEST:
                    raise TimeoutError(f"an answer of more than {_LARGEST:,} bytes")
            return response.status_code, response.headers, bytes(content)

    def _adapt(self, body: bytes) -> bool:
        """Whether the server names a setting that its model does not take, which is then left out or renamed."""
        fields = dict(self._fields)
        if b"max_completion_tokens" in body and "max_tokens" in fields:
            fields["max_completion_tokens"] = fields.pop("max_tokens")
        elif b"temperature" in body and "temperature" in fields:
            del fields["temperature"]
        else:
            return False
        self._fields = fields
        return True

    def _refusal(self, status: int, body: bytes) -> str:
        what = {401: "does not take the key", 403: "does not take the key", 404: "has no such address or model"}
        hint = "" if self._key or status == 404 else f" (no key is set in {self.config.key_variable})"
        return f"the label endpoint {what.get(status, 'takes no questions')}: HTTP {status}{hint}: {self._quoted(body)}"

    def _quoted(self, body: bytes) -> str:
        return self._clean(" ".join(body[: 4 * _QUOTED].decode("utf-8", "replace").split())[:_QUOTED])

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _answer(body: bytes) -> str | None:
    """The text of a chat completion; None for anything else."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return text if isinstance(text, str) and text.strip() else None


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, given as such or as a date; None where there is none that can be read.

    >>> _retry_after("7"), _retry_after("soon"), _retry_after("Thu, 01 Jan 1970 00:00:00 GMT")
    (7.0, None, 0.0)
    """
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
        when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
