"""Supernodes as data. Every figure is the paper's (arXiv 2506.12708); units are in the names."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Path:
    """What one die gets between two kinds of processor, one way, 512-byte latency (Table 1)."""

    read_gb_s: float
    write_gb_s: float
    read_us: float
    write_us: float


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One of the three networks (section 3.1.3). Bandwidth is the peak, one way, for one NPU."""

    name: str
    npu_gb_s: float
    use: str


@dataclass(frozen=True, kw_only=True)
class Npu:
    """One accelerator package and what it holds (section 3.3.1; peaks pinned by Table 10)."""

    name: str
    dies: int
    cube_cores_per_die: int
    vector_cores_per_die: int
    int8_tops_per_die: float
    bf16_tflops_per_die: float
    hbm_gb: int
    hbm_gb_s: float
    die_to_die_gb_s: float


@dataclass(frozen=True, kw_only=True)
class Supernode:
    """Nodes of NPUs that share one scale-up network."""

    name: str
    nodes: int
    npus_per_node: int
    cpus_per_node: int
    npu: Npu
    planes: tuple[Plane, ...]
    within_node: Path
    across_nodes: Path

    @property
    def npus(self) -> int:
        return self.nodes * self.npus_per_node

    @property
    def dies(self) -> int:
        return self.npus * self.npu.dies

    @property
    def cpus(self) -> int:
        return self.nodes * self.cpus_per_node

    def node_of(self, npu: int) -> int:
        """The node in which an NPU (a device of the virtual mesh) sits; NPUs are numbered node by node."""
        return npu // self.npus_per_node


ASCEND_910C = Npu(
    name="Ascend 910C",
    dies=2,
    cube_cores_per_die=24,
    vector_cores_per_die=48,
    int8_tops_per_die=752.0,
    bf16_tflops_per_die=353.9,
    hbm_gb=128,
    hbm_gb_s=3200.0,
    die_to_die_gb_s=270.0,
)

CLOUDMATRIX384 = Supernode(
    name="CloudMatrix384",
    nodes=48,
    npus_per_node=8,
    cpus_per_node=4,
    npu=ASCEND_910C,
    planes=(
        Plane(name="UB", npu_gb_s=392.0, use="scale-up: expert parallelism, pooled memory"),
        Plane(name="RDMA", npu_gb_s=50.0, use="scale-out: KV transfer from prefill to decode"),
        Plane(name="VPC", npu_gb_s=6.25, use="control plane and storage (400 Gbps a node)"),
    ),
    within_node=Path(read_gb_s=167, write_gb_s=137, read_us=1.2, write_us=1.3),
    across_nodes=Path(read_gb_s=164, write_gb_s=135, read_us=1.9, write_us=2.1),
)
