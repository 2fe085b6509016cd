"""One request against servers that answer well, badly, or not at all, and the parser of its events."""

import asyncio
import json

import httpx
import hypothesis.strategies as st
import pytest
from analysis.bench.conftest import Scripted
from hypothesis import example, given
from openai._streaming import SSEDecoder

from cmx_jax.analysis.bench import (
    BenchRequest,
    Client,
    EventParser,
    LoadGenerator,
    RequestOutcome,
    Target,
    measure,
)
from cmx_jax.errors import CmxError

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
GOOD = [{"choices": [{"text": "one "}]}, {"choices": [{"text": "two", "finish_reason": "length"}]}]


def stream(*documents: object, done: bool = True) -> bytes:
    texts = [x if isinstance(x, str) else json.dumps(x) for x in documents]
    return "".join(f"data: {text}\n\n" for text in [*texts, *["[DONE]"] * done]).encode()


def ask(
    server: Scripted, answer: bytes = b"", endpoint: str = "/v1/completions", timeout_s: float = 10
) -> RequestOutcome:
    server.answer = answer

    async def one() -> RequestOutcome:
        client = Client(Target(server.url, endpoint), 0.0, True, timeout_s)
        async with client:
            return await client.stream(BenchRequest(0.0, [5, 6], 3, "five six"))

    return asyncio.run(one())


def test_stream_of_text_and_usage(scripted) -> None:
    outcome = ask(scripted, b": comment\n\n" + stream(*GOOD, {"choices": [], "usage": USAGE}))
    assert (outcome.text, outcome.error, len(outcome.chunks)) == ("one two", "", 2)
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens) == (9, 3, 4)
    assert outcome.start < outcome.chunks[0] <= outcome.chunks[1] == outcome.end
    [body] = scripted.bodies
    assert body == {
        "model": "m", "prompt": [5, 6], "max_tokens": 3, "temperature": 0.0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_chat_role_is_no_first_token(scripted) -> None:
    deltas = [{"role": "assistant", "content": ""}, {"content": "Hi"}, {}]
    events = [{"choices": [{"delta": delta}]} for delta in deltas]
    events[-1]["choices"][0]["finish_reason"] = "stop"
    usage = {**USAGE, "prompt_tokens_details": None}
    outcome = ask(scripted, stream(*events, {"choices": [], "usage": usage}), "/v1/chat/completions")
    assert (outcome.text, outcome.error, len(outcome.chunks), outcome.cached_tokens) == ("Hi", "", 1, 0)
    [body] = scripted.bodies
    assert body["messages"] == [{"role": "user", "content": "five six"}]
    assert "prompt" not in body


def test_answer_without_text_has_its_end_as_first_token(scripted) -> None:
    events = [{"choices": [{"text": "", "finish_reason": "stop"}]}, {"choices": [], "usage": USAGE}]
    outcome = ask(scripted, stream(*events))
    assert (outcome.error, outcome.itls, outcome.ttft) == ("", [], outcome.e2el)


LOST = "connection lost: the stream ended before data: [DONE]"
BAD = [
    (stream(*GOOD, done=False), LOST),
    (b"<html>hello</html>", LOST),
    (stream(*GOOD), "incomplete answer: no token came, or no usage (stream_options.include_usage)"),
    (stream({"choices": [], "usage": USAGE}), "incomplete answer: no token came, or no usage"),
    (stream(GOOD[0], {"error": {"message": "NPU 3\nis gone"}}), "error in the stream: NPU 3 is gone"),
    (stream("not json"), "not understood: 'not json'"),
    (stream("[1]"), "not understood: '[1]'"),
    (stream({"choices": [{"text": 7}]}), "not understood: "),
    (stream({"usage": {"prompt_tokens": 1}}), "not understood: "),
]


@pytest.mark.parametrize(("answer", "error"), BAD)
def test_malformed_answer_is_a_failure(scripted, answer: bytes, error: str) -> None:
    outcome = ask(scripted, answer)
    assert outcome.error.startswith(error)
    assert outcome.end > outcome.start


def test_error_status_is_a_failure_with_its_message(scripted) -> None:
    scripted.status = 503
    assert ask(scripted, b'{"error": {"message": "drained"}}').error == "HTTP 503: drained"
    assert ask(scripted, b"just\ntext").error == "HTTP 503: just text"
    assert ask(scripted).error == "HTTP 503: no reason given"


def test_broken_connection_is_a_failure(scripted) -> None:
    scripted.missing = 10
    assert ask(scripted, stream(GOOD[0])).error.startswith("connection lost: ")


def test_timeout_is_a_failure(scripted) -> None:
    scripted.hold.clear()
    outcome = ask(scripted, timeout_s=0.2)
    assert outcome.error == "timeout: not finished within 0.2 s"
    assert 0.2 <= outcome.e2el < 1


def test_stopped_server_is_a_failure_of_each_request(scripted) -> None:
    client = Client(Target(scripted.url), 0.0, False, 5.0)
    scripted.socket.close()
    load = LoadGenerator([BenchRequest(0.0, [1], 1)] * 3)
    assert measure(load, client)
    assert sorted(load.outcomes) == [0, 1, 2]
    assert all(o.error.startswith("no connection: ") for o in load.outcomes.values())


def test_failed_warm_up_ends_the_measurement(scripted) -> None:
    scripted.status = 500
    load = LoadGenerator([BenchRequest(0.0, [1], 1)], [BenchRequest(0.0, [1], 1)])
    with pytest.raises(CmxError, match="a warm-up failed \\(HTTP 500: no reason given\\)"):
        measure(load, Client(Target(scripted.url), 0.0, False, 5.0))
    assert load.began is None


def test_max_concurrency_limits_requests(scripted) -> None:
    scripted.answer = stream(*GOOD, {"choices": [], "usage": USAGE})
    messages: list[str] = []
    load = LoadGenerator([BenchRequest(0.0, [1], 1)] * 9, max_concurrency=2, tell=messages.append)
    measure(load, Client(Target(scripted.url), 0.0, False, 5.0))
    outcomes = list(load.outcomes.values())
    assert not [o.error for o in outcomes if o.error]
    for o in outcomes:
        assert sum(p.start <= o.start < p.end for p in outcomes) <= 2
    assert messages == [f"{done}/9 requests" for done in range(1, 10)]


@pytest.mark.parametrize("models", [{"data": []}, {"models": [1]}, [], {"data": [{}]}])
def test_malformed_model_list_is_one_line(scripted, models: object) -> None:
    scripted.models = models
    with pytest.raises(CmxError, match="answers 200 and lists no models"):
        Target(scripted.url)


@pytest.mark.parametrize("url", ["", "127.0.0.1:1", "ftp://h", "http://", "http://h:0x", "http://h:70000"])
def test_malformed_address_is_one_line(url: str) -> None:
    with pytest.raises(CmxError, match="expected http://HOST:PORT"):
        Target(url)


def test_address_may_end_in_v1(scripted) -> None:
    assert Target(f"{scripted.url}/v1/").base_url == scripted.url
    assert httpx.get(f"{scripted.url}/v1/models").status_code == 200


ENDS = st.sampled_from(["\n", "\r\n", "\r"])
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0\ufeff"), max_size=8)
FIELD = st.sampled_from(["data: ", "data:", "data", ": ", "event: ", "retry: ", "dat: ", "data:  "])
# the end of an event is drawn often, else there are few
LINES = st.lists(st.one_of(st.just(""), st.just(""), st.builds(str.__add__, FIELD, LINE)), max_size=20)


@given(LINES, ENDS, st.lists(st.integers(0, 200), max_size=12))
@example(["data: a", "data: b", "", "data: é", ""], "\r\n", list(range(40)))
def test_event_parser_any_cut(lines: list[str], end: str, cuts: list[int]) -> None:
    """However the bytes of a stream are cut, its events are those that OpenAI's own client reads."""
    stream = "".join(line + end for line in [*lines, ":"]).encode()
    expected = [event.data for event in SSEDecoder().iter_bytes(iter([stream])) if event.data]
    cuts = sorted(min(cut, len(stream)) for cut in cuts)
    parser, events = EventParser(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        events += parser.feed(stream[start:stop])
    assert [data for data in events if data] == expected


def test_event_parser_returns_events_as_soon_as_they_end() -> None:
    parser = EventParser()
    assert parser.feed(b"data: one\n") == []
    assert parser.feed(b"\ndata: t") == ["one"]
    assert parser.feed(b"wo\n\n") == ["two"]
