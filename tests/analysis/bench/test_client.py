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


def test_text_and_usage_are_read(scripted) -> None:
    found = ask(scripted, b": comment\n\n" + stream(*GOOD, {"choices": [], "usage": USAGE}))
    assert (found.text, found.error, len(found.chunks)) == ("one two", "", 2)
    assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (9, 3, 4)
    assert found.start < found.chunks[0] <= found.chunks[1] == found.end
    [body] = scripted.bodies
    assert body == {
        "model": "m", "prompt": [5, 6], "max_tokens": 3, "temperature": 0.0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_a_role_is_no_first_token_of_a_chat(scripted) -> None:
    deltas = [{"role": "assistant", "content": ""}, {"content": "Hi"}, {}]
    events = [{"choices": [{"delta": delta}]} for delta in deltas]
    events[-1]["choices"][0]["finish_reason"] = "stop"
    usage = {**USAGE, "prompt_tokens_details": None}
    found = ask(scripted, stream(*events, {"choices": [], "usage": usage}), "/v1/chat/completions")
    assert (found.text, found.error, len(found.chunks), found.cached_tokens) == ("Hi", "", 1, 0)
    [body] = scripted.bodies
    assert body["messages"] == [{"role": "user", "content": "five six"}]
    assert "prompt" not in body


def test_an_answer_without_text_has_its_end_for_the_first_token(scripted) -> None:
    events = [{"choices": [{"text": "", "finish_reason": "stop"}]}, {"choices": [], "usage": USAGE}]
    found = ask(scripted, stream(*events))
    assert (found.error, found.itls, found.ttft) == ("", [], found.e2el)


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
def test_an_answer_that_is_none_is_a_failure(scripted, answer: bytes, error: str) -> None:
    found = ask(scripted, answer)
    assert found.error.startswith(error)
    assert found.end > found.start


def test_other_answers_are_failures_with_what_they_say(scripted) -> None:
    scripted.status = 503
    assert ask(scripted, b'{"error": {"message": "drained"}}').error == "HTTP 503: drained"
    assert ask(scripted, b"just\ntext").error == "HTTP 503: just text"
    assert ask(scripted).error == "HTTP 503: no reason given"


def test_a_connection_that_breaks_is_a_failure(scripted) -> None:
    scripted.missing = 10
    assert ask(scripted, stream(GOOD[0])).error.startswith("connection lost: ")


def test_a_request_that_takes_too_long_is_given_up(scripted) -> None:
    scripted.hold.clear()
    found = ask(scripted, timeout_s=0.2)
    assert found.error == "timeout: not finished within 0.2 s"
    assert 0.2 <= found.e2el < 1


def test_a_server_that_has_gone_is_a_failure_of_each_request(scripted) -> None:
    client = Client(Target(scripted.url), 0.0, False, 5.0)
    scripted.socket.close()
    load = LoadGenerator([BenchRequest(0.0, [1], 1)] * 3)
    assert measure(load, client)
    assert sorted(load.outcomes) == [0, 1, 2]
    assert all(o.error.startswith("no connection: ") for o in load.outcomes.values())


def test_a_warm_up_that_fails_ends_it(scripted) -> None:
    scripted.status = 500
    load = LoadGenerator([BenchRequest(0.0, [1], 1)], [BenchRequest(0.0, [1], 1)])
    with pytest.raises(CmxError, match="a warm-up failed \\(HTTP 500: no reason given\\)"):
        measure(load, Client(Target(scripted.url), 0.0, False, 5.0))
    assert load.began is None


def test_at_most_so_many_run_at_once(scripted) -> None:
    scripted.answer = stream(*GOOD, {"choices": [], "usage": USAGE})
    told: list[str] = []
    load = LoadGenerator([BenchRequest(0.0, [1], 1)] * 9, max_concurrency=2, tell=told.append)
    measure(load, Client(Target(scripted.url), 0.0, False, 5.0))
    found = list(load.outcomes.values())
    assert not [o.error for o in found if o.error]
    for o in found:
        assert sum(p.start <= o.start < p.end for p in found) <= 2
    assert told == [f"{done}/9 requests" for done in range(1, 10)]


@pytest.mark.parametrize("models", [{"data": []}, {"models": [1]}, [], {"data": [{}]}])
def test_a_list_that_is_none_is_one_line(scripted, models: object) -> None:
    scripted.models = models
    with pytest.raises(CmxError, match="answers 200 and lists no models"):
        Target(scripted.url)


@pytest.mark.parametrize("url", ["", "127.0.0.1:1", "ftp://h", "http://", "http://h:0x", "http://h:70000"])
def test_an_address_that_is_none_is_one_line(url: str) -> None:
    with pytest.raises(CmxError, match="expected http://HOST:PORT"):
        Target(url)


def test_v1_may_be_part_of_the_address(scripted) -> None:
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
