"""The token exchange: sends tokens to the ranks of their experts and combines the results.

The way of a token through a MoE layer, with the paper's names (section 4.2.1):

    gate            chooses K experts for each token              model/gate.py
      |             chooses a slot (replica) of each expert       mesh/placement.py: choose_slots
      v
    FusedDispatch   queues the token's copies by rank             mailbox.py: _queue
      |             packs token, scale, slot into a message       message.py: pack_messages
      |             moves messages to the ranks of their slots    Route.dispatch, made by
      |                                                             mailbox.py: mailbox_route
      |                                                             ragged.py: ragged_route
      v
    experts         run on the received rows                      ExpertFn, given by model/moe.py
      |             which `Wire` reads                            message.py: Wire
      v
    FusedCombine    moves results back, unquantised               Route.combine
                    sums them, weighted, in float32               mailbox.py: mailbox_exchange

The paper's operators write each message straight into a preallocated slot of the peer's memory. An XLA
all-to-all moves the whole mailbox instead, so here the mailbox `[G, rows, message]` is sized for the usual
load and drained in rounds.

Methods differ in how messages travel:

    flat            whole mailboxes, by one all-to-all over all ranks
    hierarchical    whole mailboxes, tier by tier, as UB switches are tiered (section 3.1.4): nodes are an
                    axis of their own
    ragged          only real messages, on accelerators
    allgather       no messages: all tokens go to all ranks (allgather.py); where tensor parallelism has them
                    there already, nothing moves
"""

from functools import partial

from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange.allgather import allgather_exchange
from cmx_jax.mesh.exchange.axis_collectives import Axis, gather, psum_if
from cmx_jax.mesh.exchange.mailbox import (
    flat,
    hierarchical,
    mailbox_exchange,
    mailbox_route,
    usual_rows,
    worst_case_rows,
)
from cmx_jax.mesh.exchange.message import MAX_SLOTS_PER_RANK, WIRES, Wire, message_bytes
from cmx_jax.mesh.exchange.protocol import Exchange, ExchangeArgs, ExchangeStats
from cmx_jax.mesh.exchange.ragged import ragged_route

__all__ = [
    "EXCHANGES",
    "MAX_SLOTS_PER_RANK",
    "WIRES",
    "Axis",
    "Exchange",
    "ExchangeArgs",
    "ExchangeStats",
    "Wire",
    "allgather_exchange",
    "exchange",
    "gather",
    "message_bytes",
    "psum_if",
    "usual_rows",
    "worst_case_rows",
]

EXCHANGES: dict[str, Exchange] = {
    "flat": partial(mailbox_exchange, make_route=partial(mailbox_route, flat)),
    "hierarchical": partial(mailbox_exchange, make_route=partial(mailbox_route, hierarchical)),
    "ragged": partial(mailbox_exchange, make_route=ragged_route),
    "allgather": allgather_exchange,
}


def exchange(method: str) -> Exchange:
    """Returns the exchange method of that name.

    Raises:
      CmxError: The name is unknown.
    """
    if method not in EXCHANGES:
        raise CmxError(f"exchange {method!r} is unknown, expected one of {sorted(EXCHANGES)}")
    return EXCHANGES[method]
