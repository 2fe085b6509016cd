"""The memory pool: the CPUs' DRAM, which NPUs read and write over UB (section 4.4.1)."""

from cmx_jax.mesh.supernode import Path

POOL = Path(read_gb_s=147, write_gb_s=107, read_us=1.7, write_us=1.9)
"""Table 1, NPU to CPU across nodes, of one die."""


def read_s(size: float, dies: int = 1) -> float:
    """Seconds in which `dies` dies read `size` bytes, each its share. CPUs are taken to be fast enough."""
    return POOL.read_us / 1e6 + size / dies / (POOL.read_gb_s * 1e9)
