"""Carving of a supernode's NPUs into instances (section 2: prefill, decode and caching are equal pools).

The paper's deployment is the default: one decode instance of 160 NPUs (20 nodes) and six prefill instances of
16 NPUs (2 nodes) each. On 384 NPUs that leaves 128, enough for eight more prefill instances.
"""

from dataclasses import dataclass

from cmx_jax.errors import CmxError
from cmx_jax.mesh.supernode import CLOUDMATRIX384, Supernode

DECODE_NPUS = 160
PREFILL_NPUS = 16


@dataclass(frozen=True)
class Slice:
    """The NPUs of one instance: `[start, start + npus)` of the supernode.

    Attributes:
      name: Name of the instance, such as `prefill-0`.
      role: `decode`, `prefill` or `spare`.
      start: Number of the first NPU.
      npus: Number of NPUs.
    """

    name: str
    role: str
    start: int
    npus: int

    @property
    def stop(self) -> int:
        """Number of the NPU after the last one."""
        return self.start + self.npus


@dataclass(frozen=True)
class Pools:
    """Instances that do not overlap, in the order of their NPUs, and the NPUs that are left.

    Attributes:
      supernode: Supernode that is carved.
      decode: Decode instances.
      prefill: Prefill instances.
      spare: NPUs that are left.

    Example:
      >>> carve().spare.npus
      128
    """

    supernode: Supernode
    decode: tuple[Slice, ...]
    prefill: tuple[Slice, ...]
    spare: Slice

    def as_dict(self) -> dict[str, object]:
        """Returns JSON data with one entry per instance, which names its first and last node."""

        def entry(s: Slice) -> dict[str, object]:
            first, last = self.supernode.node_of(s.start), self.supernode.node_of(s.stop - 1)
            return {"name": s.name, "npus": s.npus, "first_npu": s.start, "nodes": [first, last]}

        return {
            "decode": [entry(s) for s in self.decode],
            "prefill": [entry(s) for s in self.prefill],
            "spare": {"npus": self.spare.npus, "prefill_instances": self.spare.npus // PREFILL_NPUS},
        }


def carve(
    supernode: Supernode = CLOUDMATRIX384,
    *,
    decode: int = 1,
    prefill: int = 6,
    decode_npus: int = DECODE_NPUS,
    prefill_npus: int = PREFILL_NPUS,
) -> Pools:
    """Carves a supernode into decode instances, followed by prefill instances.

    Args:
      supernode: Supernode to carve.
      decode: Number of decode instances.
      prefill: Number of prefill instances.
      decode_npus: NPUs per decode instance.
      prefill_npus: NPUs per prefill instance.

    Raises:
      CmxError: A size is not positive, or spans several nodes but not whole ones, or there are too few NPUs.

    Example:
      >>> pools = carve(decode=1, prefill=6)
      >>> pools.decode[0].npus, len(pools.prefill), pools.prefill[0].start
      (160, 6, 160)
    """
    node = supernode.npus_per_node
    for name, npus in (("decode_npus", decode_npus), ("prefill_npus", prefill_npus)):
        if npus < 1 or (npus % node and node % npus):
            raise CmxError(f"{name} is {npus}, expected whole nodes of {node} NPUs, or a divisor of {node}")
    if decode < 0 or prefill < 0:
        raise CmxError(f"{decode} decode and {prefill} prefill instances, expected zero or more of each")
    slices: dict[str, list[Slice]] = {"decode": [], "prefill": []}
    start = 0
    for role, count, npus in (("decode", decode, decode_npus), ("prefill", prefill, prefill_npus)):
        part = min(npus, node)
        start = -(-start // part) * part  # an instance spans no more nodes than it fills
        for index in range(count):
            slices[role].append(Slice(f"{role}-{index}", role, start, npus))
            start += npus
    if start > supernode.npus:
        raise CmxError(
            f"{decode} x {decode_npus} decode and {prefill} x {prefill_npus} prefill NPUs need {start}, "
            f"{supernode.name} has {supernode.npus}: carve fewer or smaller instances"
        )
    spare = Slice("spare", "spare", start, supernode.npus - start)
    return Pools(supernode, tuple(slices["decode"]), tuple(slices["prefill"]), spare)
