"""Packs prompts of unequal length into the rows of a prefill batch; long ones in chunks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cmx_jax.model.batch import PrefillBatch
from cmx_jax.model.cache import NO_PAGE
from cmx_jax.model.sampling import Sampling
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
    """Chooses the pieces of prompts that each batch row runs in a step.

    In order, every prompt takes what is left of the emptiest row of its rank.

    Args:
      requests: Requests to prefill, each with its rank.
      ranks: Number of ranks of the instance.
      rows: Number of batch rows per rank.
      budget: Tokens per row, rounded down to pages; a chunk that does not end its prompt ends with a page.
      width: Tokens per page.

    Returns:
      Pieces of each of the `ranks * rows` rows.
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
    """A prefill batch.

    Attributes:
      batch: Arrays of the batch.
      cached: True if a piece follows an earlier chunk of its prompt.
    """

    batch: PrefillBatch
    cached: bool


def pack(pieces: list[list[Piece]], pages: dict[Request, list[int]], width: int, unit: int) -> Packed:
    """Packs pieces of prompts into arrays.

    The addresses of each sequence begin with a page. If no piece follows an earlier chunk, each token stands
    at the index that is its address; otherwise tokens stand close together.

    Args:
      pieces: Pieces of each row.
      pages: Pages of each request.
      width: Tokens per page.
      unit: Unit of row lengths, which are `unit * 2^n` tokens: few lengths, few programs.
    """
    cached = any(piece.start for row in pieces for piece in row)
    spans = [sum(pages_for(p.stop, width) * width for p in row) for row in pieces]
    span = bucket(max(spans), unit)
    fresh = [sum(pages_for(p.stop - p.start, width) * width for p in row) for row in pieces]
    length = bucket(max(fresh), unit) if cached else span
    sequences, rows = length // width, len(pieces)
    tokens, begins = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    positions, following = np.full((rows, length), -1, np.int32), np.full((rows, length), -1, np.int32)
    table = np.full((rows, span // width), NO_PAGE, np.int32)
    last, lengths = np.full((rows, sequences), -1, np.int32), np.zeros((rows, sequences), np.int32)
    slots: list[int] = []
    for row, row_pieces in enumerate(pieces):
        index = address = 0
        for n, piece in enumerate(row_pieces):
            prompt, size = piece.request.prefill_tokens, piece.stop - piece.start
            indices = slice(index, index + size)
            tokens[row, indices] = prompt[piece.start : piece.stop]
            positions[row, indices] = np.arange(piece.start, piece.stop)
            begins[row, indices] = address
            next_tokens = prompt[piece.start + 1 : piece.stop + 1]
            following[row, index : index + len(next_tokens)] = next_tokens
            ids = pages[piece.request][: pages_for(piece.stop, width)]
            table[row, address // width : address // width + len(ids)] = ids
            last[row, n], lengths[row, n] = index + size - 1, piece.stop
            slots.append(row * sequences + n)
            index += pages_for(size, width) * width
            address += len(ids) * width
    requests = [piece.request for row_pieces in pieces for piece in row_pieces]
    params = sampling(rows * sequences, slots, requests)
    by_row = Sampling(
        *(a.reshape(rows, sequences) for a in (params.temperature, params.top_k, params.top_p, params.seed))
    )
    return Packed(PrefillBatch(tokens, positions, begins, following, table, last, lengths, by_row), cached)


def bucket(count: int, unit: int) -> int:
    """Returns the smallest `unit * 2^n` that is at least `count`: few shapes, few programs."""
    size = unit
    while size < count:
        size *= 2
    return size


def sampling(size: int, rows: list[int], requests: list[Request]) -> Sampling:
    """Returns the sampling parameters of each row; rows without a request are greedy."""
    s = Sampling(
        temperature=np.zeros(size, np.float32),
        top_k=np.zeros(size, np.int32),
        top_p=np.ones(size, np.float32),
        seed=np.zeros(size, np.uint32),
    )
    for row, request in zip(rows, requests, strict=True):
        p = request.params
        top_p = max(p.top_p, np.finfo(np.float32).tiny)  # the most likely token is kept in any case
        s.temperature[row], s.top_k[row], s.top_p[row], s.seed[row] = p.temperature, p.top_k, top_p, p.seed
    return s
