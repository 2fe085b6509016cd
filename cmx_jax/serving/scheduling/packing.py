"""Prompts of unequal length, packed into the rows of a prefill batch; long ones in chunks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cmx_jax.model.cache import NO_PAGE
from cmx_jax.model.sampling import Sampling
from cmx_jax.model.steps import PrefillBatch
from cmx_jax.serving.scheduling.pages import pages_for
from cmx_jax.serving.scheduling.request import Request


class Piece(NamedTuple):
    """The tokens `[start, stop)` of a prompt."""

    request: Request
    start: int
    stop: int


def schedule(
    requests: Iterable[tuple[Request, int]], ranks: int, rows: int, budget: int, width: int
) -> list[list[Piece]]:
    """The pieces that each batch row runs in a step.

    In order, every prompt takes what is left to it of the emptiest row of its rank.

    Args:
      requests: what is to be prefilled, and the rank where it lies.
      ranks: of the instance.
      rows: of each rank.
      budget: tokens of a row, rounded to pages; a chunk that does not end its prompt ends with a page.
      width: tokens of a page.

    Returns:
      `ranks * rows` lists.
    """
    budget = max(budget // width, 1) * width
    pieces: list[list[Piece]] = [[] for _ in range(ranks * rows)]
    left = [budget] * len(pieces)
    for request, rank in requests:
        row = max(range(rank * rows, (rank + 1) * rows), key=lambda row: left[row])
        start = request.prefilled
        stop = min(len(request.prefill_tokens), start + left[row])
        if stop < len(request.prefill_tokens):
            stop = stop // width * width
        if stop > start:
            pieces[row].append(Piece(request, start, stop))
            left[row] -= pages_for(stop - start, width) * width
            if not any(left):
                break
    return pieces


@dataclass(frozen=True)
class Packed:
    """A prefill batch; `cached`: whether a piece begins behind an earlier chunk."""

    batch: PrefillBatch
    cached: bool


def pack(pieces: list[list[Piece]], pages: dict[Request, list[int]], width: int, unit: int) -> Packed:
    """Rows of pieces as arrays.

    Each sequence's addresses begin with a page. While no piece has a past, each token stands at the index
    that is its address; else tokens stand close together.

    Args:
      pieces: of each row.
      pages: that each request holds.
      width: tokens of a page.
      unit: rows are `unit * 2^n` tokens long: few lengths, few programs.
    """
    cached = any(piece.start for row in pieces for piece in row)
    room = [sum(pages_for(p.stop, width) * width for p in row) for row in pieces]
    span = bucket(max(room), unit)
    fresh = [sum(pages_for(p.stop - p.start, width) * width for p in row) for row in pieces]
    length = bucket(max(fresh), unit) if cached else span
    most, rows = length // width, len(pieces)
    tokens, begins = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    positions, following = np.full((rows, length), -1, np.int32), np.full((rows, length), -1, np.int32)
    table = np.full((rows, span // width), NO_PAGE, np.int32)
    last, lengths = np.full((rows, most), -1, np.int32), np.zeros((rows, most), np.int32)
    slots: list[int] = []
    for row, of in enumerate(pieces):
        at = address = 0
        for n, piece in enumerate(of):
            prompt, size = piece.request.prefill_tokens, piece.stop - piece.start
            here = slice(at, at + size)
            tokens[row, here] = prompt[piece.start : piece.stop]
            positions[row, here] = np.arange(piece.start, piece.stop)
            begins[row, here] = address
            behind = prompt[piece.start + 1 : piece.stop + 1]
            following[row, at : at + len(behind)] = behind
            held = pages[piece.request][: pages_for(piece.stop, width)]
            table[row, address // width : address // width + len(held)] = held
            last[row, n], lengths[row, n] = at + size - 1, piece.stop
            slots.append(row * most + n)
            at += pages_for(size, width) * width
            address += len(held) * width
    params = sampling(rows * most, slots, [piece.request for of in pieces for piece in of])
    by_row = Sampling(
        *(a.reshape(rows, most) for a in (params.temperature, params.top_k, params.top_p, params.seed))
    )
    return Packed(PrefillBatch(tokens, positions, begins, following, table, last, lengths, by_row), cached)


def bucket(count: int, unit: int) -> int:
    """The smallest `unit * 2^n` that holds `count`: few shapes, few programs."""
    size = unit
    while size < count:
        size *= 2
    return size


def sampling(size: int, rows: list[int], requests: list[Request]) -> Sampling:
    """Sampling parameters of each row; rows without a request are greedy."""
    s = Sampling(
        temperature=np.zeros(size, np.float32),
        top_k=np.zeros(size, np.int32),
        top_p=np.ones(size, np.float32),
        seed=np.zeros(size, np.uint32),
    )
    for row, request in zip(rows, requests, strict=True):
        p = request.params
        s.temperature[row], s.top_k[row], s.top_p[row], s.seed[row] = p.temperature, p.top_k, p.top_p, p.seed
    return s
