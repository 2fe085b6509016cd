"""Every constant of the cost model, each with its source.

A constant is `stated` (a property of the hardware, from a source outside this model), `fitted` to
operator-level measurements (`analysis/cost/measured.py`), or `assumed` if no source states it; its source
then gives the reason. No constant is set by an end-to-end figure of a system: those figures are predicted.

The paper is arXiv 2506.12708; sections and tables are numbered as in the paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from cmx_jax.errors import CmxError
from cmx_jax.mesh.supernode import ASCEND_910C, CLOUDMATRIX384

Origin = Literal["stated", "fitted", "assumed"]


@dataclass(frozen=True)
class Constant:
    """One constant of a machine (per die or GPU).

    Attributes:
      value: Value in `unit`.
      unit: Unit of the value.
      origin: Kind of evidence for the value.
      source: Publication, table or reason that the value comes from.
    """

    value: float
    unit: str
    origin: Origin
    source: str


@dataclass(frozen=True)
class MachineModel:
    """An accelerator as the cost model sees it. A rank is a die or a GPU.

    `model[name]` is the value of a constant.

    Attributes:
      name: Value of `--hardware` that selects the machine.
      ranks_per_npu: Number of dies per package.
      ranks_per_node: Number of ranks on one node, the nearest network.
      kind: Either `ascend`, whose matrix and vector cores work in parallel and can be divided among streams,
        or `gpu`.
      constants: Constants of the machine, keyed by name.
      overrides: Values that replace those of `constants`, keyed by name.
    """

    name: str
    ranks_per_npu: int
    ranks_per_node: int
    kind: Literal["ascend", "gpu"]
    constants: Mapping[str, Constant]
    overrides: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def __getitem__(self, name: str) -> float:
        return self.overrides.get(name, self.constants[name].value)

    def scaled(self, name: str, factor: float) -> "MachineModel":
        """Returns a copy with one constant multiplied by `factor`."""
        return replace(self, overrides={**self.overrides, name: self[name] * factor})


_UB, _NODE, _DIE = CLOUDMATRIX384.across_nodes, CLOUDMATRIX384.within_node, ASCEND_910C
assert _UB and _NODE  # noqa: PT018 (Table 1 has both)
_SIM = "constants of Huawei's own simulator of this box (second-hand)"

_CLOUDMATRIX = {
    "int8_tops": Constant(_DIE.int8_tops_per_die, "TOPS", "stated", "pinned by Table 10"),
    "bf16_tflops": Constant(
        _DIE.bf16_tflops_per_die, "TFLOPS", "stated", "public device profile of the die; CANN's 614 = 86.8 %"
    ),
    "fp32_tflops": Constant(99.5, "TFLOPS", "stated", "public device profile of the die"),
    "hbm_gb_s": Constant(_DIE.hbm_gb_s / 2, "GB/s", "stated", "section 3.3.1"),
    "hbm_gb": Constant(_DIE.hbm_gb / 2, "GB", "stated", "section 3.3.1"),
    "cores": Constant(_DIE.cube_cores_per_die, "AIC", "stated", "section 3.3.1"),
    "tile_rows": Constant(128, "rows", "stated", "BM of Table 10"),
    "tile_columns": Constant(152, "columns", "stated", "BN of Table 10"),
    "matmul_efficiency": Constant(
        0.861, "of peak", "fitted", "Table 10: of tiles that are full and infinitely deep"
    ),
    "matmul_fill": Constant(350, "of K", "fitted", "Table 10: depth that a tile's start and end cost"),
    "attention_tflops": Constant(246, "TFLOPS", "fitted", "section 7.5, Table 8: CANN MLA 65.4 % of 376"),
    "prefill_tflops": Constant(246, "TFLOPS", "assumed", "of attention over whole prompts: as CANN MLA's"),
    "attention_memory": Constant(0.841, "of HBM", "fitted", "Table 9: CANN MLA 1346 of 1600 GB/s"),
    "matmul_memory": Constant(
        0.841,
        "of HBM",
        "fitted",
        "Table 9: weights reach the matrix cores by the same loads as MLA's latents",
    ),
    "vector_memory": Constant(0.6, "of HBM", "stated", _SIM + ": memory efficiency"),
    "sort_width": Constant(
        4, "lists", "stated", "Ascend C's MrgSort merges four lists, Sort32 sorts 32 numbers"
    ),
    "matmul_launch_us": Constant(5.0, "us", "stated", _SIM + ": static cost of a matrix operator"),
    "vector_launch_us": Constant(2.0, "us", "stated", _SIM + ": static cost of a vector operator"),
    "exchange_launch_us": Constant(10.0, "us", "stated", _SIM + ": static cost of communication"),
    "network_us": Constant(_UB.write_us, "us", "stated", "Table 1: NPU to NPU, write across nodes, 512 B"),
    "node_us": Constant(_NODE.write_us, "us", "stated", "Table 1: NPU to NPU, write within a node, 512 B"),
    "network_gb_s": Constant(_UB.write_gb_s, "GB/s", "stated", "Table 1: NPU to NPU, write across nodes"),
    "network_peak_gb_s": Constant(196, "GB/s", "stated", "section 3.3.1: UB of a die, one way"),
    "flights": Constant(
        2, "latencies", "stated", "section 4.2.1: the payload's write, then the flag's, in both operators"
    ),
    "near_ranks": Constant(
        2, "ranks", "stated", "section 3.3.1: the two dies of a package do not meet over UB"
    ),
    "dispatch_ns": Constant(117.5, "ns a message", "fitted", "Table 7, CANN EP dispatch, EP8 to EP256"),
    "combine_ns": Constant(134.8, "ns a message", "fitted", "Table 7, CANN EP combine, EP8 to EP256"),
    "dispatch_bytes": Constant(512, "B a message", "stated", "section 4.2.1: the scale, padded"),
}

_DEEPEP = "DeepEP's table for H800, normal kernels, EP32, of the release that Table 7 measures"
_GEMM = "DeepGEMM's table for H800: K = 512 to 16384 at M = 4096"


def _hopper(network: str) -> dict[str, Constant]:
    """Returns the constants of H800 and H100 SXM, which differ in NVLink only: experts across nodes do not
    depend on it."""
    return {
        "int8_tops": Constant(1979, "TFLOPS FP8", "stated", "NVIDIA's data sheet, dense"),
        "bf16_tflops": Constant(989, "TFLOPS", "stated", "NVIDIA's data sheet, dense"),
        "fp32_tflops": Constant(494, "TFLOPS", "stated", "NVIDIA's data sheet, TF32 dense"),
        "hbm_gb_s": Constant(3350, "GB/s", "stated", "NVIDIA's data sheet"),
        "hbm_gb": Constant(80, "GB", "stated", "NVIDIA's data sheet"),
        "cores": Constant(132, "SM", "stated", "NVIDIA's data sheet"),
        "tile_rows": Constant(128, "rows", "fitted", _GEMM),
        "tile_columns": Constant(128, "columns", "fitted", _GEMM),
        "matmul_efficiency": Constant(0.740, "of peak", "fitted", _GEMM),
        "matmul_fill": Constant(740, "of K", "fitted", _GEMM),
        "attention_tflops": Constant(660, "TFLOPS", "fitted", "Table 8: FlashMLA 66.7 % of 989"),
        "prefill_tflops": Constant(
            579, "TFLOPS", "fitted", "FlashAttention-3's figure 5: causal, heads of 128, 4,096 tokens"
        ),
        "attention_memory": Constant(0.896, "of HBM", "fitted", "Table 9: FlashMLA 3000 of 3350 GB/s"),
        "matmul_memory": Constant(
            0.796, "of HBM", "fitted", "DeepGEMM's table for H800: 2668 GB/s at M = 64"
        ),
        "vector_memory": Constant(0.796, "of HBM", "assumed", "as products that stream their weights"),
        "matmul_launch_us": Constant(2.0, "us", "assumed", "from kernel to kernel of a CUDA graph"),
        "vector_launch_us": Constant(2.0, "us", "assumed", "from kernel to kernel of a CUDA graph"),
        "exchange_launch_us": Constant(2.0, "us", "assumed", "from kernel to kernel of a CUDA graph"),
        "network_us": Constant(2.0, "us", "assumed", "an InfiniBand write, one switch"),
        "node_us": Constant(2.0, "us", "assumed", "low-latency kernels go by RDMA even within a node"),
        "network_gb_s": Constant(50, "GB/s", "stated", network),
        "network_peak_gb_s": Constant(50, "GB/s", "stated", network),
        "flights": Constant(2, "latencies", "assumed", "payload, then flag"),
        "near_ranks": Constant(1, "ranks", "stated", "low-latency kernels go by RDMA even within a node"),
        "dispatch_ns": Constant(177.6, "ns a message", "fitted", "Table 7, DeepEP dispatch, EP8 to EP256"),
        "combine_ns": Constant(346.8, "ns a message", "fitted", "Table 7, DeepEP combine, EP8 to EP256"),
        "dispatch_bytes": Constant(
            224, "B a message", "stated", "DeepSeek-V3: a float32 scale for 128 numbers"
        ),
        "normal_dispatch_gb_s": Constant(44, "GB/s", "stated", _DEEPEP),
        "normal_combine_gb_s": Constant(47, "GB/s", "stated", _DEEPEP),
        "exchange_cores": Constant(24, "SM", "stated", "section 4.3.2: H800 reserves 24 of 132 SMs"),
    }


MACHINES = {
    "cloudmatrix384": MachineModel("cloudmatrix384", 2, 16, "ascend", _CLOUDMATRIX),
    "h800": MachineModel("h800", 1, 8, "gpu", _hopper("CX7, 400 Gb/s a GPU")),
    "h100": MachineModel("h100", 1, 8, "gpu", _hopper("CX7, 400 Gb/s a GPU")),
}


def machine(name: str) -> MachineModel:
    """Returns the machine called `name`.

    Raises:
      CmxError: No machine has that name.
    """
    if name not in MACHINES:
        raise CmxError(f"hardware {name!r}, expected one of {', '.join(MACHINES)}")
    return MACHINES[name]
