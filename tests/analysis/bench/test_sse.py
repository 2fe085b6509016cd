"""Events of a stream: however its bytes are cut, they are those that OpenAI's own client reads."""

import hypothesis.strategies as st
from hypothesis import example, given
from openai._streaming import SSEDecoder

from cmx_jax.analysis.bench.sse import EventParser

ENDS = st.sampled_from(["\n", "\r\n", "\r"])
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0\ufeff"), max_size=8)
FIELD = st.sampled_from(["data: ", "data:", "data", ": ", "event: ", "retry: ", "dat: ", "data:  "])
# the end of an event is drawn often, else there are few
LINES = st.lists(st.one_of(st.just(""), st.just(""), st.builds(str.__add__, FIELD, LINE)), max_size=20)


@given(LINES, ENDS, st.lists(st.integers(0, 200), max_size=12))
@example(["data: a", "data: b", "", "data: é", ""], "\r\n", list(range(40)))
def test_any_cut_gives_the_same_events(lines: list[str], end: str, cuts: list[int]) -> None:
    stream = "".join(line + end for line in [*lines, ":"]).encode()
    expected = [event.data for event in SSEDecoder().iter_bytes(iter([stream])) if event.data]
    cuts = sorted(min(cut, len(stream)) for cut in cuts)
    parser, found = EventParser(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += parser.feed(stream[start:stop])
    assert [data for data in found if data] == expected


def test_an_event_comes_as_soon_as_it_is_whole() -> None:
    parser = EventParser()
    assert parser.feed(b"data: one\n") == []
    assert parser.feed(b"\ndata: t") == ["one"]
    assert parser.feed(b"wo\n\n") == ["two"]
