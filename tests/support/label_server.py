"""A stand-in for an OpenAI-compatible endpoint, and features whose labels it can know: feature j fires on ` fogj`."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from steersman.steer.labels.describe import FeatureExamples
from steersman.steer.labels.prompts import LabelExample

FILLER = (" the", " old", " house", " was", " very", " quiet", " that", " day", " in", " may")


def planted_examples(feature: int, n: int = 8) -> FeatureExamples:
    """n texts with ` fogJ` among filler, and as many without."""

    def text(at: int, word: str | None) -> LabelExample:
        tokens = [FILLER[(at + i) % len(FILLER)] for i in range(6)]
        values = [0.0] * 6
        if word is not None:
            tokens[at % 6], values[at % 6] = word, 9.0 - at
        return LabelExample((f" {at}", *tokens), (0.0, *values))

    return FeatureExamples(
        active=[text(at, f" fog{feature}") for at in range(n)],
        inactive=[text(at, None) for at in range(50, 50 + n // 2)],
        raised=(" mist",),
    )


def knowing(messages: Any) -> str:
    """What a model answers that understands: the marked word as a label, and verdicts by whether it is there."""
    system, question = messages[0]["content"], messages[1]["content"]
    if "LABEL" in system:
        return f"LABEL: the word {re.findall(r'<<(.*?)>>', question)[0].strip()}"
    word = question.split("the word ")[1].split("\n")[0]
    texts = question.split("\n\n", 1)[1].split("\n")
    wanted = rf"<<\W*{word}\W*>>" if "<<" in system else rf"\b{word}\b"
    return json.dumps([int(bool(re.search(wanted, text))) for text in texts])


class LabelServer:
    """Answers as `answer` says: a text, or (status, headers, body), for each request; what it was sent is kept."""

    def __init__(self) -> None:
        self.answer: Callable[[list[dict[str, str]]], Any] = knowing
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.url = ""


@contextmanager
def label_server() -> Iterator[LabelServer]:
    """A server on a free port of this machine."""
    state, guard = LabelServer(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with guard:
                state.requests.append({"path": self.path, **body})
                state.headers.append(dict(self.headers.items()))
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                found = state.answer(body["messages"])
            finally:
                with guard:
                    state.at_once -= 1
            if isinstance(found, str):
                found = (200, {}, json.dumps({"choices": [{"message": {"content": found}}]}))
            status, headers, text = found
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # the client gave up

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def stalling(seconds: float) -> str:
    """An answer that comes late."""
    time.sleep(seconds)
    return "LABEL: late"
