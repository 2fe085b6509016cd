"""Machines as data. Units are in the names.

CloudMatrix384's figures are the paper's (arXiv 2506.12708), the H800's are from the sources beside them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Path:
    """Bandwidth and latency of one die on a path, one way, latency for 512 bytes (Table 1)."""

    read_gb_s: float
    write_gb_s: float
    read_us: float
    write_us: float


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One of the networks (section 3.1.3). Bandwidth is the peak of one NPU, one way."""

    name: str
    npu_gb_s: float
    use: str


@dataclass(frozen=True, kw_only=True)
class Npu:
    """One accelerator package (section 3.3.1; peaks from Table 10).

    Cube cores multiply matrices, as a GPU's tensor cores do. Vector cores correspond to a GPU's SMs.
    """

    name: str
    dies: int
    cube_cores_per_die: int
    vector_cores_per_die: int
    int8_tops_per_die: float
    bf16_tflops_per_die: float
    hbm_gb: int
    hbm_gb_s: float
    die_to_die_gb_s: float | None  # None if there is only one die


@dataclass(frozen=True, kw_only=True)
class Supernode:
    """Nodes of NPUs that share one scale-up network. RDMA connects several supernodes.

    Example:
      >>> CLOUDMATRIX384.npus, CLOUDMATRIX384.node_of(9)
      (384, 1)
    """

    name: str
    nodes: int
    npus_per_node: int
    cpus_per_node: int
    npu: Npu
    planes: tuple[Plane, ...]
    within_node: Path | None  # None if not published in this form
    across_nodes: Path | None

    @property
    def npus(self) -> int:
        return self.nodes * self.npus_per_node

    @property
    def dies(self) -> int:
        return self.npus * self.npu.dies

    def node_of(self, npu: int) -> int:
        """Returns the node of an NPU (a device of the virtual mesh). NPUs are numbered node by node."""
        return npu // self.npus_per_node

    def supernode_of(self, npu: int) -> int:
        """Returns the supernode of an NPU."""
        return npu // self.npus


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

H800 = Npu(
    name="NVIDIA H800 SXM",
    dies=1,
    cube_cores_per_die=528,  # 4 in each SM (NVIDIA H100 Tensor Core GPU Architecture)
    vector_cores_per_die=132,  # SMs (DeepSeek-V3 report, arXiv 2412.19437, section 3.5.1)
    # dense peaks of INT8 (FP8's are the same), BF16; memory: NVIDIA H800 datasheet, those of the H100 SXM
    int8_tops_per_die=1979.0,
    bf16_tflops_per_die=989.5,
    hbm_gb=80,
    hbm_gb_s=3350.0,
    die_to_die_gb_s=None,
)

H800_NODE = Supernode(
    name="H800 node",
    nodes=1,
    npus_per_node=8,
    cpus_per_node=2,  # DGX H800 datasheet
    npu=H800,
    planes=(
        # 400 GB/s both ways, and a 400G ConnectX-7 for each GPU (arXiv 2505.09343, section 4.1)
        Plane(name="NVLink", npu_gb_s=200.0, use="within a node"),
        Plane(name="RDMA", npu_gb_s=50.0, use="across nodes: expert parallelism, KV transfer"),
    ),
    within_node=None,
    across_nodes=None,
)
"""Node on which DeepSeek serves (arXiv 2505.09343, section 4.1). The scale-up network ends with the node."""
