"""The exchange in rounds, which all methods share that send each message to its own rank.

Every rank queues its messages by destination. In each round it sends up to `rows` messages of each queue, the
experts run, and results return, until no rank has messages left. Nothing is dropped; the number of rounds is
an output. With `rows` at the worst case (`worst_case_rows`, the paper's `max_tokens`) there is always one
round.

A `Route` says where messages lie in the outbox and moves them. `mailbox_route` gives each peer a mailbox of
`rows` rows and moves whole mailboxes by all-to-all, `flat` or `hierarchical`; `ragged.py` has another route.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from cmx_jax.mesh.exchange.axis_collectives import Axis, axis_names
from cmx_jax.mesh.exchange.message import Wire, pack_messages
from cmx_jax.mesh.exchange.ordering import rank_in_group
from cmx_jax.mesh.exchange.protocol import ExchangeArgs, ExchangeStats, ExpertFn, MakeRoute, Route


def worst_case_rows(tokens: int, top_k: int, slots_per_rank: int) -> int:
    """Rows that one peer can ever need: `local_batch x min(top_k, experts_per_rank)` (section 4.2.1).

    This holds because the slots of a token are all different.
    """
    return tokens * min(top_k, slots_per_rank)


def usual_rows(tokens: int, top_k: int, slots_per_rank: int, ranks: int) -> int:
    """Twice the mean load of a peer plus two, at most the worst case."""
    mean = -(-tokens * top_k // ranks)
    return min(worst_case_rows(tokens, top_k, slots_per_rank), 2 * mean + 2)


def mailbox_exchange(
    x: Float[Array, "T D"],
    slots: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    experts: ExpertFn,
    args: ExchangeArgs,
    *,
    make_route: MakeRoute,
) -> tuple[Float[Array, "T D"], ExchangeStats]:
    """Dispatches messages, runs experts and combines results, round by round. See `Exchange`.

    Tokens leave in the wire type. Results return in `x.dtype` if the wire type is float32, else in bfloat16.
    The sum is taken in float32 in the order of `k`, so that neither rounds nor ranks change the result.

    Args:
      x: Tokens of this rank.
      slots: Global expert slots of each token, all different; -1 sends nothing.
      weights: Weight of each expert's result in the sum.
      experts: Runs the local experts.
      args: Settings.
      make_route: Makes the route of each round.
    """
    axis, slots_per_rank, rows, wire = args.axis, args.slots_per_rank, args.rows, args.wire
    ranks = jax.lax.axis_size(axis)
    (tokens, top_k), width = slots.shape, x.shape[-1]
    messages, flat_slots = tokens * top_k, slots.reshape(-1)
    copies = jnp.broadcast_to(x[:, None], (tokens, top_k, width)).reshape(messages, width)
    queues = _queue(flat_slots, slots_per_rank, ranks)
    read = Wire(width, wire, x.dtype)
    result_dtype = x.dtype if wire == "float32" else jnp.dtype(jnp.bfloat16)

    def one_round(number: Int[Array, ""] | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        results, count = carry
        with jax.named_scope("Dispatch"):
            route = make_route(jnp.clip(queues.lengths - number * rows, 0, rows), rows, messages, axis)
            row = queues.position - number * rows
            sent = (row >= 0) & (row < rows) & (queues.destination < ranks)
            index = jnp.where(sent, route.start[queues.destination] + row, route.size)
            packed = pack_messages(copies, flat_slots % slots_per_rank, sent, wire)
            outbox = jnp.zeros((route.size, packed.shape[1]), packed.dtype)
            received = route.dispatch(outbox.at[index].set(packed, mode="drop", unique_indices=True))
            local = read.slots(received)
        answers = experts(received, local, read).astype(result_dtype)
        with jax.named_scope("Combine"):
            answers = route.combine(answers)[jnp.where(sent, index, 0)].astype(x.dtype)
        results = jnp.where(sent[:, None], answers, results)
        return results, count + jnp.sum(local >= 0).astype(jnp.int32)

    start = jnp.zeros((messages, width), x.dtype), jnp.zeros((), jnp.int32)
    if rows >= worst_case_rows(tokens, top_k, slots_per_rank):
        rounds = jnp.ones((), jnp.int32)
        results, answered = one_round(0, start)
    else:  # every rank must take part in every round, so all agree on their number first
        rounds = jax.lax.pmax(-(-jnp.max(queues.lengths) // rows), axis).astype(jnp.int32)
        results, answered = jax.lax.fori_loop(0, rounds, one_round, start)
    used = jnp.where(slots < 0, 0.0, weights)
    answers = results.reshape(tokens, top_k, width).astype(jnp.float32)
    y = jnp.einsum("tk,tkd->td", used, answers, precision="highest").astype(x.dtype)
    return y, ExchangeStats(rounds, jnp.sum(flat_slots >= 0).astype(jnp.int32), answered)


class _Queues(NamedTuple):
    """Queues of a rank's messages, one for each destination.

    Attributes:
      destination: Rank that each message goes to; `G` for a message that is not sent.
      position: Position of each message in the queue of its destination.
      lengths: Number of messages in each queue.
    """

    destination: Int[Array, " Z"]
    position: Int[Array, " Z"]
    lengths: Int[Array, " G"]


def _queue(slots: Int[Array, " Z"], slots_per_rank: int, ranks: int) -> _Queues:
    """Queues messages by destination, in the order of their tokens."""
    destination = jnp.where(slots < 0, ranks, slots // slots_per_rank)
    position, counts = rank_in_group(destination, ranks + 1)
    return _Queues(destination, position, counts[:ranks])


MoveMailboxes = Callable[[Shaped[Array, "Z M"], Axis], Shaped[Array, "Z M"]]
"""Turns mailboxes `[ranks * rows, message]` by destination into mailboxes by source."""


def mailbox_route(
    move: MoveMailboxes, counts: Int[Array, " G"], rows: int, messages: int, axis: Axis
) -> Route:
    """Route in which every peer has a mailbox of `rows` rows, and whole mailboxes move, filled or not.

    See `MakeRoute` for the other arguments.
    """
    del messages
    ranks = len(counts)

    def carry(mail: Shaped[Array, "Z M"]) -> Shaped[Array, "Z M"]:
        return move(mail, axis)

    return Route(jnp.arange(ranks, dtype=jnp.int32) * rows, ranks * rows, carry, carry)


def flat(mail: Shaped[Array, "Z M"], axis: Axis) -> Shaped[Array, "Z M"]:
    """Moves mailboxes by one all-to-all over all ranks."""
    boxes = mail.reshape(jax.lax.axis_size(axis), -1, mail.shape[-1])
    return jax.lax.all_to_all(boxes, axis, 0, 0).reshape(mail.shape)


def hierarchical(mail: Shaped[Array, "Z M"], axis: Axis) -> Shaped[Array, "Z M"]:
    """Moves mailboxes by one all-to-all for each axis, innermost first.

    With axes of nodes and NPUs, mail goes to the right NPU number within the node, then to the right node.
    Every byte moves once per axis, but a rank of 20 nodes talks to 7 + 19 others instead of 159.
    """
    names = axis_names(axis)
    boxes = mail.reshape(*(jax.lax.axis_size(name) for name in names), -1, mail.shape[-1])
    for dim, name in reversed(list(enumerate(names))):
        boxes = jax.lax.all_to_all(boxes, name, dim, dim)
    return boxes.reshape(mail.shape)
