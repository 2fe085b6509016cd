"""What the exchanges and the drafts of an instance did, summed over steps."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cmx_jax.model.moe import MoEStats


@dataclass
class Traffic:
    """Sums over steps.

    Attributes:
      steps: how many.
      layers: MoE layers that ran in them, MTP's included.
      messages: that were sent, over all layers and ranks.
      rounds: of the exchanges, over all layers.
      most_rounds: of one layer.
      imbalance: of each layer the messages of the busiest rank over the mean, summed.
      load: how often each expert was chosen, `[L, E]` of each stack, since experts were last placed.
      proposed, accepted: drafts by position.
      sent: prompts whose pages each of the ranks that share sequences has sent on.
    """

    steps: int = 0
    layers: int = 0
    messages: int = 0
    rounds: int = 0
    most_rounds: int = 0
    imbalance: float = 0.0
    load: dict[str, np.ndarray] = field(default_factory=dict)
    proposed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    accepted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sent: dict[int, int] = field(default_factory=dict)

    def add(self, stats: MoEStats | None, moe_layers: int) -> None:
        """Counts a step; the stats of `moe_layers` layers stand before those of the MTP layer's runs."""
        self.steps += 1
        if stats is None:
            return
        rounds, received = stats.exchange.rounds[:, 0], stats.exchange.received
        self.layers += len(rounds)
        self.messages += int(stats.exchange.sent.sum())
        self.rounds += int(rounds.sum())
        self.most_rounds = max(self.most_rounds, int(rounds.max()))
        mean = received.mean(axis=1)
        self.imbalance += float(
            np.where(mean > 0, received.max(axis=1) / np.where(mean > 0, mean, 1), 1).sum()
        )
        load = stats.load.sum(axis=1, dtype=np.int64)
        self._count("moe", load[:moe_layers])
        if len(load) > moe_layers:
            self._count("mtp", load[moe_layers:].sum(axis=0, keepdims=True))

    def _count(self, stack: str, load: np.ndarray) -> None:
        self.load[stack] = self.load.get(stack, 0) + load

    def load_of(self, placement: dict[str, np.ndarray], experts: int) -> dict[str, np.ndarray]:
        """The load of all layers of a placement; ones where nothing was measured."""
        found = {}
        for stack, table in placement.items():
            found[stack] = np.ones((len(table), experts))
            if stack in self.load and self.load[stack].any():
                found[stack][: len(self.load[stack])] = self.load[stack]
        return found

    def drafted(self, tokens: np.ndarray, accepted: np.ndarray) -> None:
        """Counts the drafts of a step: `tokens [B, 1 + k]` that went in, `accepted [B]`."""
        if tokens.shape[1] == 1:
            return
        proposed = (tokens[:, 1:] >= 0).sum(axis=0)
        right = (accepted[:, None] > np.arange(tokens.shape[1] - 1)).sum(axis=0)
        if not self.proposed.size:
            self.proposed, self.accepted = np.zeros_like(proposed), np.zeros_like(right)
        self.proposed, self.accepted = self.proposed + proposed, self.accepted + right

    def report(self, ranks: int, dispatch: int, combine: int) -> dict[str, Any]:
        """For JSON: of a mean step the bytes that one rank dispatched and combined, of a mean layer the
        rounds and the busiest rank's share.

        Payload: real messages of `dispatch` and `combine` bytes, also where `allgather` moves every token
        everywhere. The mailboxes around them move more: see `Layout.mailbox_rows`. Rounds are summed over
        microbatches.
        """
        per_rank, layers = self.messages / max(self.steps, 1) / ranks, max(self.layers, 1)
        found: dict[str, Any] = {
            "dispatch_bytes": per_rank * dispatch,
            "combine_bytes": per_rank * combine,
            "rounds_mean": self.rounds / layers,
            "rounds_most": self.most_rounds,
            "busiest_rank_over_mean": self.imbalance / layers,
            "steps": self.steps,
        }
        if len(self.sent) > 1:
            found["prompts_sent_by_rank"] = dict(sorted(self.sent.items()))
        if self.proposed.size:
            found["drafts_proposed"] = self.proposed.tolist()
            found["acceptance"] = (self.accepted / np.maximum(self.proposed, 1)).round(4).tolist()
        return found
