"""Counts of the exchanges and drafts of an instance, summed over steps."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from cmx_jax.model.moe import MoEStats


def load_of(
    measured: dict[str, np.ndarray], placement: dict[str, np.ndarray], experts: int
) -> dict[str, np.ndarray]:
    """Returns the load of all layers of a placement; ones where nothing was measured."""
    loads = {}
    for stack, table in placement.items():
        loads[stack] = np.ones((len(table), experts))
        if stack in measured and measured[stack].any():
            loads[stack][: len(measured[stack])] = measured[stack]
    return loads


def total_load(parts: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the sum of measured loads, `[L, E]` by stack."""
    total: dict[str, np.ndarray] = {}
    for part in parts:
        for stack, load in part.items():
            total[stack] = total[stack] + load if stack in total else load
    return total


@dataclass
class Traffic:
    """Sums over steps.

    Attributes:
      steps: Number of steps.
      layers: Number of MoE layers that ran in them, MTP layers included.
      messages: Number of messages sent, over all layers and ranks.
      rounds: Number of exchange rounds, over all layers.
      most_rounds: Largest number of exchange rounds of one layer.
      imbalance: Sum over layers of the busiest rank's messages divided by the mean of all ranks.
      load: Number of times that each expert was chosen since the experts were last placed, `[L, E]` for each
        stack of layers.
      proposed: Number of drafts proposed, by position.
      accepted: Number of drafts accepted, by position.
      sent: Number of prompts whose pages a rank has sent, by its index among ranks that share sequences.
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
        """Counts a step; its statistics have `moe_layers` layers, then those of the MTP layer's runs."""
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

    def drafted(self, tokens: np.ndarray, accepted: np.ndarray) -> None:
        """Counts the drafts of a step by its input tokens `[B, 1 + k]` and its accepted drafts `[B]`."""
        if tokens.shape[1] == 1:
            return
        proposed = (tokens[:, 1:] >= 0).sum(axis=0)
        right = (accepted[:, None] > np.arange(tokens.shape[1] - 1)).sum(axis=0)
        if not self.proposed.size:
            self.proposed, self.accepted = np.zeros_like(proposed), np.zeros_like(right)
        self.proposed, self.accepted = self.proposed + proposed, self.accepted + right

    def report(self, ranks: int, dispatch: int, combine: int) -> dict[str, object]:
        """Returns means for JSON: bytes per rank and step, rounds and load of the busiest rank per layer.

        Bytes are payload: messages times `dispatch` and `combine` bytes, also where `allgather` moves every
        token everywhere. The mailboxes around them move more: see `Layout.mailbox_rows`. Rounds are summed
        over microbatches.

        Args:
          ranks: Number of ranks.
          dispatch: Bytes per dispatched message.
          combine: Bytes per combined message.
        """
        per_rank, layers = self.messages / max(self.steps, 1) / ranks, max(self.layers, 1)
        report: dict[str, object] = {
            "dispatch_bytes": per_rank * dispatch,
            "combine_bytes": per_rank * combine,
            "rounds_mean": self.rounds / layers,
            "rounds_most": self.most_rounds,
            "busiest_rank_over_mean": self.imbalance / layers,
            "steps": self.steps,
        }
        if len(self.sent) > 1:
            report["prompts_sent_by_rank"] = dict(sorted(self.sent.items()))
        if self.proposed.size:
            report["drafts_proposed"] = self.proposed.tolist()
            report["acceptance"] = (self.accepted / np.maximum(self.proposed, 1)).round(4).tolist()
        return report
