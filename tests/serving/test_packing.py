"""Chunks cover every prompt once, in order, within the budget; rows keep sequences apart."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.model.cache import NO_PAGE
from cmx_jax.serving.scheduling.packing import bucket, pack, schedule
from cmx_jax.serving.scheduling.pages import pages_for
from cmx_jax.serving.scheduling.request import Request, SamplingParams

WIDTH = 4


def requests(lengths: list[int]) -> list[Request]:
    """Prompts in which every token is another."""
    starts = np.cumsum([1, *lengths])
    return [
        Request(list(range(start, start + n)), SamplingParams(temperature=n / 100, seed=n))
        for start, n in zip(starts, lengths, strict=False)
    ]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
)
@settings(deadline=None)
def test_chunks_cover_each_prompt_once_and_in_order(lengths, ranks, rows, budget) -> None:
    waiting = [(request, i % ranks) for i, request in enumerate(requests(lengths))]
    left, steps = list(waiting), 0
    while left:
        pieces = schedule(left, ranks, rows, budget, WIDTH)
        assert len(pieces) == ranks * rows
        assert any(pieces)  # something always goes on
        first = left[0][0]
        assert any(piece.request is first for row in pieces for piece in row)  # and the oldest does
        for row, row_pieces in enumerate(pieces):
            assert sum(piece.stop - piece.start for piece in row_pieces) <= max(budget // WIDTH, 1) * WIDTH
            for piece in row_pieces:
                assert dict(left)[piece.request] == row // rows
                assert piece.start == piece.request.prefilled
                assert piece.start % WIDTH == 0
                assert piece.start < piece.stop <= len(piece.request.prompt)
                assert piece.stop == len(piece.request.prompt) or piece.stop % WIDTH == 0
                piece.request.prefilled = piece.stop
        left = [(r, rank) for r, rank in left if r.prefilled < len(r.prompt)]
        steps += 1
    assert steps <= sum(-(-n // WIDTH) for n in lengths)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3), st.data())
@settings(deadline=None)
def test_packed_rows_keep_sequences_apart(lengths, rows, data) -> None:
    """Each token stands at an address of its own sequence, whose pages are those that the request holds."""
    drawn = requests(lengths)
    for request in drawn:
        request.prefilled = data.draw(st.integers(0, (len(request.prompt) - 1) // WIDTH)) * WIDTH
    pieces = schedule([(request, 0) for request in drawn], 1, rows, 1000, WIDTH)
    numbers = iter(range(100, 1000))
    pages = {r: [next(numbers) for _ in range(pages_for(len(r.prompt), WIDTH))] for r in drawn}
    packed = pack(pieces, pages, WIDTH, 2 * WIDTH)
    b, seen = packed.batch, []
    assert packed.cached == any(r.prefilled for r in drawn)
    assert b.tokens.shape[1] == bucket(b.tokens.shape[1], 2 * WIDTH)
    for row, t in np.argwhere(b.positions >= 0):
        position, address = b.positions[row, t], b.begin[row, t] + b.positions[row, t]
        token = b.tokens[row, t]
        request = next(r for r in drawn if token in r.prompt)
        assert request.prompt[position] == token
        page = b.page_table[row, address // WIDTH]
        assert page == pages[request][position // WIDTH]
        assert address % WIDTH == position % WIDTH
        if not packed.cached:
            assert address == t
        follows = request.prompt[position + 1] if position + 1 < len(request.prompt) else -1
        assert b.following[row, t] == follows
        seen.append(token)
    assert sorted(seen) == sorted(token for r in drawn for token in r.prompt[r.prefilled :])
    used = b.page_table[b.page_table != NO_PAGE]
    assert len(set(used.tolist())) == used.size
    for row, row_pieces in enumerate(pieces):
        for n, piece in enumerate(row_pieces):
            assert b.tokens[row, b.last[row, n]] == piece.request.prompt[-1]
            assert b.lengths[row, n] == len(piece.request.prompt)
            assert b.sampling.seed[row, n] == len(piece.request.prompt)
        assert (b.last[row, len(row_pieces) :] == -1).all()
