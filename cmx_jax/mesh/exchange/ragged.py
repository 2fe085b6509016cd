"""Route on which only real messages travel, by ragged all-to-all: the paper's direct writes (section 4.2.1).

A rank's messages of a round lie densely in the outbox by destination and arrive densely in the inbox by
source: no peer has a mailbox of its own. Each rank tells each peer how many messages it sends and learns from
the peers' counts where each of them will write; then the messages move, as FusedDispatch sends status and
data. Results go back to the rows of the outbox from which their messages came.

The inbox has `ranks * rows` rows, the most that one round can bring and as many as the mailboxes have. This
saves bytes on the wire and the clearing of rows that stay empty.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from cmx_jax.mesh.exchange.axis_collectives import Axis
from cmx_jax.mesh.exchange.protocol import Route


def ragged_route(counts: Int[Array, " G"], rows: int, messages: int, axis: Axis) -> Route:
    """Route of a round by ragged all-to-all. See `cmx_jax.mesh.exchange.protocol.MakeRoute`."""
    counts = counts.astype(jnp.int32)
    start = jnp.cumsum(counts) - counts
    status = jax.lax.all_to_all(jnp.stack([counts, start], axis=1), axis, 0, 0)
    arriving, home = status[:, 0], status[:, 1]  # from each source: messages, and their first row there
    begin = jnp.cumsum(arriving) - arriving
    remote = jax.lax.all_to_all(begin, axis, 0, 0, tiled=True)  # at each destination: first row of mine
    size, capacity = min(messages, len(counts) * rows), len(counts) * rows

    def dispatch(outbox: Shaped[Array, "Z M"]) -> Shaped[Array, "_ M"]:
        inbox = jax.lax.empty((capacity, outbox.shape[1]), outbox.dtype)
        inbox = jax.lax.ragged_all_to_all(outbox, inbox, start, counts, remote, arriving, axis_name=axis)
        live = jnp.arange(capacity, dtype=jnp.int32) < jnp.sum(arriving)
        return jnp.where(live[:, None], inbox, jnp.zeros((), outbox.dtype))

    def combine(answers: Shaped[Array, "Z D"]) -> Shaped[Array, "_ D"]:
        outbox = jax.lax.empty((size, answers.shape[1]), answers.dtype)
        return jax.lax.ragged_all_to_all(answers, outbox, begin, arriving, home, counts, axis_name=axis)

    return Route(start, size, dispatch, combine)
