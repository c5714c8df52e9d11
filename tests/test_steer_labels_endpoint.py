"""Labels in a language model's words: the questions, the scores, and an endpoint at its worst."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.label_server import LabelServer, knowing, label_server, planted_examples, stalling

from steersman.errors import SteersmanError
from steersman.steer.labels.describe import DescribeConfig, FeatureExamples, describe_features, labelling_cost
from steersman.steer.labels.endpoint import AnswerMissing, EndpointRefused, LabelEndpoint, LabelEndpointConfig
from steersman.steer.labels.journal import LabelJournal
from steersman.steer.labels.prompts import LabelExample, label_prompt
from steersman.steer.labels.scoring import judged_texts

KEY = "sk-test-4711"
CONFIG = DescribeConfig(concurrency=2, per_request=3)
PLANTED = {feature: planted_examples(feature) for feature in range(4)}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, no_progress: None) -> Iterator[LabelServer]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STEERSMAN_LABEL_KEY", KEY)
    with label_server() as running:
        yield running


def endpoint(server: LabelServer, **settings: Any) -> LabelEndpoint:
    return LabelEndpoint(
        LabelEndpointConfig(url=server.url, model="toy", **{"max_wait": 0.1, "retries": 2, **settings})
    )


def test_labels_and_scores_of_a_model_that_understands(server: LabelServer) -> None:
    before = labelling_cost(PLANTED, name="toy", config=CONFIG)
    with endpoint(server) as ask:
        found = describe_features(ask, PLANTED, name="toy", config=CONFIG)
    assert [found.labels.text(j) for j in PLANTED] == [f"the word fog{j}" for j in PLANTED]
    assert all(label.scores == {"detection": 1.0, "fuzzing": 1.0} for label in found.labels.values())
    assert {label.source for label in found.labels.values()} == {"toy"}
    assert not found.missing
    assert not found.skipped
    assert len(server.requests) == before.requests == 4 * (1 + 2 * 3)  # 4 texts of either kind, three a request
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert {request["model"] for request in server.requests} == {"toy"}
    assert server.most_at_once <= 2
    assert "mist" in server.requests[0]["messages"][1]["content"]


def test_a_label_that_fits_nothing_scores_as_chance(no_progress: None) -> None:
    def blind(messages: Any) -> str:
        answer = knowing(messages)
        return "LABEL: the word sea" if "LABEL" in answer else answer

    found = describe_features(blind, PLANTED, name="mine", config=CONFIG)
    assert all(label.scores == {"detection": 0.5, "fuzzing": 0.5} for label in found.labels.values())


def test_what_is_judged_is_none_of_what_was_shown() -> None:
    shown, test = PLANTED[0].split(CONFIG)
    assert not {one.text for one in shown} & {one.text for one in test}
    assert len(shown) == len(test) == 4
    assert [max(one.activations) for one in PLANTED[0].active[::2]] == [max(one.activations) for one in shown]


def test_fuzzing_marks_strong_tokens_and_as_many_elsewhere() -> None:
    active = [LabelExample((" a", " b", " c", " d"), (0.0, 1.0, 9.0, 3.0))]
    inactive = [LabelExample((" e", " f", " g", " h", " i"), (0.0,) * 5)]
    shown = judged_texts("fuzzing", active, inactive, threshold=0.3, seed=0)
    assert {one.text for one in shown if one.active} == {" a b<< c d>>"}
    (other,) = [one.text for one in shown if not one.active]
    inside = "".join(part.split(">>")[0] for part in other.split("<<")[1:])
    assert len(inside.split()) == 3, "as many as the feature is active on, those below the threshold too"
    assert {one.text for one in judged_texts("detection", active, inactive, 0.3, 0)} == {" a b c d", " e f g h i"}


def test_the_prompt_tells_strengths_from_one_to_ten() -> None:
    prompt = label_prompt(
        [LabelExample((" a", " sun", " b"), (0.0, 8.0, 0.1)), LabelExample((" rain",), (2.1,))], [], 0.3
    )
    question = prompt[1]["content"]
    assert "1.  a<< sun>> b" in question
    assert '" sun" 10' in question
    assert '" rain" 3' in question


@pytest.mark.parametrize("trouble", ["500", "429", "429 date", "nonsense", "no json", "empty", "stall", "cut off"])
def test_trouble_that_passes_costs_nothing_but_tries(server: LabelServer, trouble: str) -> None:
    seen: list[float] = []

    def answer(messages: Any) -> Any:
        seen.append(time.monotonic())
        if len(seen) != 2:
            return knowing(messages)
        return {
            "500": (500, {}, "oh"),
            "429": (429, {"Retry-After": "0"}, "slow down"),
            "429 date": (429, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, "slow down"),
            "nonsense": "I would rather talk about the weather.\nAnd about the sea.",
            "no json": (200, {}, "<html>"),
            "empty": (200, {}, json.dumps({"choices": []})),
            "cut off": (200, {"Transfer-Encoding": "chunked"}, "zz"),
        }.get(trouble) or stalling(0.4)

    server.answer = answer
    with endpoint(server, timeout={"stall": 0.25, "cut off": 0.5}.get(trouble, 5)) as ask:
        found = describe_features(ask, {1: PLANTED[1]}, name="toy", config=CONFIG, concurrency=1)
    assert not found.missing
    assert found.labels[1].scores == {"detection": 1.0, "fuzzing": 1.0}
    assert len(server.requests) == 7 + 1


def test_a_full_server_is_left_alone_by_all_questions(server: LabelServer) -> None:
    seen: list[float] = []

    def answer(messages: Any) -> Any:
        seen.append(time.monotonic())
        return (429, {"Retry-After": "1"}, "") if len(seen) == 1 else knowing(messages)

    server.answer = answer
    with endpoint(server, max_wait=3.0) as ask:
        describe_features(ask, {1: PLANTED[1]}, name="toy", config=CONFIG, test_examples=0)
    assert seen[1] - seen[0] >= 0.95
    server.answer = lambda messages: (429, {"Retry-After": "3600"}, "")
    with endpoint(server) as ask, pytest.raises(AnswerMissing, match="asks to wait 3600 s"):
        ask([{"role": "user", "content": "x"}])


def test_a_run_goes_on_where_it_can_and_asks_nothing_twice(server: LabelServer, tmp_path: Path) -> None:
    def answer(messages: Any) -> Any:
        return (400, {}, "no") if "fog2" in messages[1]["content"] else knowing(messages)

    server.answer = answer
    with endpoint(server) as ask, LabelJournal(tmp_path / "answers.jsonl") as journal:
        found = describe_features(ask, PLANTED, name="toy", config=CONFIG, journal=journal)
    assert list(found.labels) == [0, 1, 3]
    assert list(found.missing) == [2]
    assert "HTTP 400: no" in found.missing[2]
    assert "no label: 1 (2)" in found.to_text()
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "cut sho')  # a kill while a line was written
    server.answer, asked = knowing, len(server.requests)
    with endpoint(server) as ask, LabelJournal(tmp_path / "answers.jsonl") as journal:
        left = labelling_cost(PLANTED, name="toy", config=CONFIG, journal=journal)
        again = describe_features(ask, PLANTED, name="toy", config=CONFIG, journal=journal)
    assert len(server.requests) - asked == 7 == left.requests
    assert left.known == 21
    assert [again.labels.text(j) for j in PLANTED] == [f"the word fog{j}" for j in PLANTED]
    assert again.labels[0] == found.labels[0]


def test_an_endpoint_that_is_dead_is_asked_a_few_times_only(server: LabelServer) -> None:
    server.answer = lambda messages: (503, {"Retry-After": "0"}, "down")
    many = {feature: planted_examples(feature) for feature in range(40)}
    with endpoint(server) as ask:
        found = describe_features(ask, many, name="toy", config=CONFIG, give_up_after=3)
    assert not found.labels
    assert len(found.missing) == 40
    assert len(server.requests) <= 3 * (3 + 2)
    assert "questions in a row had no answer, the last: HTTP 503" in found.to_text()


def test_a_model_that_answers_nonsense_alone_is_not_asked_for_long(server: LabelServer) -> None:
    server.answer = lambda messages: "Once upon a time\nthere was a model."
    many = {feature: planted_examples(feature) for feature in range(40)}
    with endpoint(server) as ask:
        found = describe_features(ask, many, name="toy", config=CONFIG, give_up_after=3)
    assert not found.labels
    assert len(found.missing) == 40
    assert len(server.requests) <= 2 * (3 + 1)
    assert "the answer is not one line: LABEL: a short phrase" in found.to_text()


def test_a_score_that_did_not_come_is_missing_and_the_label_stays(server: LabelServer) -> None:
    def answer(messages: Any) -> Any:
        return knowing(messages) if "LABEL" in messages[0]["content"] else "[1, 2, 3]"

    server.answer = answer
    with endpoint(server) as ask:
        found = describe_features(ask, {1: PLANTED[1]}, name="toy", config=CONFIG, give_up_after=99)
    assert found.labels.text(1) == "the word fog1"
    assert found.labels[1].scores == {}
    assert "not a list of" in found.missing[1]
    assert "no or fewer scores: 1 (1)" in found.to_text()


def test_features_without_enough_texts_are_left_out_and_not_missing(no_progress: None) -> None:
    never, once = FeatureExamples(active=[], inactive=[]), FeatureExamples(active=PLANTED[1].active[:1], inactive=[])
    found = describe_features(knowing, {0: never, 1: once}, name="mine", config=CONFIG)
    assert list(found.labels) == [1]
    assert not found.missing
    assert list(found.skipped) == [0, 1]


def test_the_key_goes_to_the_host_of_the_address_alone(
    server: LabelServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    question = [{"role": "user", "content": "x"}]
    with label_server() as elsewhere:
        server.answer = lambda messages: (307, {"Location": f"{elsewhere.url}/chat/completions"}, "")
        with endpoint(server) as ask, pytest.raises(EndpointRefused, match="sends on to 127.0.0.1") as refused:
            ask(question)
        assert not elsewhere.requests
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    server.answer = lambda messages: (401, {}, f"wrong key {KEY}")
    with (
        endpoint(server) as ask,
        pytest.raises(EndpointRefused, match=r"does not take the key: HTTP 401: .*\*\*\*") as wrong,
    ):
        ask(question)
    told = caplog.text + str(refused.value) + str(wrong.value) + repr(ask)
    assert KEY not in told
    with pytest.raises(SteersmanError, match="would go to gpu-box in the clear"):
        LabelEndpoint(LabelEndpointConfig(url="http://gpu-box:8000/v1", model="toy"))
    monkeypatch.delenv("STEERSMAN_LABEL_KEY")
    with LabelEndpoint(LabelEndpointConfig(url="http://gpu-box:8000/v1", model="toy")):
        pass
    with endpoint(server) as ask, pytest.raises(EndpointRefused, match="no key is set in STEERSMAN_LABEL_KEY"):
        ask(question)
    assert "Authorization" not in server.headers[-1]


def test_a_refusal_ends_the_asking(server: LabelServer) -> None:
    server.answer = lambda messages: (404, {}, "no model toy")
    with endpoint(server) as ask:
        found = describe_features(ask, PLANTED, name="toy", config=CONFIG, concurrency=1)
    assert len(server.requests) == 1
    assert set(found.missing) == set(PLANTED)
    assert "no such address or model" in found.to_text()
    assert "no such address or model" in found.refused


def test_no_more_requests_than_allowed(server: LabelServer) -> None:
    with endpoint(server, max_requests=5) as ask:
        found = describe_features(ask, PLANTED, name="toy", config=CONFIG)
    assert len(server.requests) == 5
    assert "5 requests were sent, as many as max_requests allows" in found.to_text()


def test_settings_that_a_model_does_not_take_are_left_out(server: LabelServer) -> None:
    def answer(messages: Any) -> Any:
        sent = server.requests[-1]
        if "max_tokens" in sent:
            return (400, {}, "use max_completion_tokens")
        return (400, {}, "temperature must be 1") if "temperature" in sent else knowing(messages)

    server.answer = answer
    with endpoint(server) as ask:
        found = describe_features(ask, {1: PLANTED[1]}, name="toy", config=CONFIG, concurrency=1)
    assert not found.missing
    assert len(server.requests) == 7 + 2
    assert server.requests[-1]["max_completion_tokens"] == 512


def test_waiting_ends_when_the_run_does(server: LabelServer) -> None:
    server.answer = lambda messages: (429, {"Retry-After": "30"}, "")
    ask, raised = endpoint(server, max_wait=60.0), []

    def question() -> None:
        try:
            ask([{"role": "user", "content": "x"}])
        except AnswerMissing as error:
            raised.append(str(error))

    thread = threading.Thread(target=question)
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    ask.close()
    thread.join(10)
    assert not thread.is_alive()
    assert raised


def test_what_a_function_raises_leaves_one_question_open(no_progress: None) -> None:
    def moody(messages: Any) -> str:
        if "fog1" in messages[1]["content"]:
            raise RuntimeError("out of credit")
        return knowing(messages)

    found = describe_features(moody, PLANTED, name="mine", config=CONFIG)
    assert list(found.labels) == [0, 2, 3]
    assert found.missing == {1: "RuntimeError: out of credit"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"url": "ftp://x"}, "an address such as"), ({"url": "https://me:secret@x/v1"}, "holds a password"),
     ({"retries": -1}, "at least 0"), ({"timeout": 0.0}, "above 0")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SteersmanError, match=words) as error:
        LabelEndpointConfig(**{"url": "https://x/v1", "model": "toy", **settings})
    assert "secret" not in str(error.value)
