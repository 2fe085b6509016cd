"""Only real messages travel, by ragged all-to-all: the paper's direct writes (section 4.2.1).

A rank's messages of a round lie densely by destination and arrive densely by source: no peer has a mailbox of
its own. Each rank tells each peer how many it sends, each learns from that where it will write, and then the
messages move, as FusedDispatch's status and data do. Results go back to where their messages came from.

The receive buffer has `ranks * rows` rows, what one round can bring: as many as the mailboxes have. What is
saved is bytes on the wire, and the clearing of rows that nobody fills.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from cmx_jax.mesh.exchange.mailbox import Axis, Route


def packed(counts: Int[Array, " G"], rows: int, messages: int, axis: Axis) -> Route:
    """A round by ragged all-to-all; see `cmx_jax.mesh.exchange.mailbox.Travel`."""
    counts = counts.astype(jnp.int32)
    start = jnp.cumsum(counts) - counts
    told = jax.lax.all_to_all(jnp.stack([counts, start], axis=1), axis, 0, 0)
    arriving, home = told[:, 0], told[:, 1]  # of each source: how many, and where its messages for me begin
    begin = jnp.cumsum(arriving) - arriving
    there = jax.lax.all_to_all(begin, axis, 0, 0, tiled=True)  # where mine begin at each destination
    size, room = min(messages, len(counts) * rows), len(counts) * rows

    def out(mail: Shaped[Array, "S M"]) -> Shaped[Array, "N M"]:
        inbox = jax.lax.empty((room, mail.shape[1]), mail.dtype)
        inbox = jax.lax.ragged_all_to_all(mail, inbox, start, counts, there, arriving, axis_name=axis)
        live = jnp.arange(room, dtype=jnp.int32) < jnp.sum(arriving)
        return jnp.where(live[:, None], inbox, jnp.zeros((), mail.dtype))

    def back(answers: Shaped[Array, "N D"]) -> Shaped[Array, "S D"]:
        outbox = jax.lax.empty((size, answers.shape[1]), answers.dtype)
        return jax.lax.ragged_all_to_all(answers, outbox, begin, arriving, home, counts, axis_name=axis)

    return Route(start, size, out, back)
