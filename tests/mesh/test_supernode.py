"""CloudMatrix384 adds up to the totals that the paper prints."""

import pytest

from cmx_jax.mesh import CLOUDMATRIX384 as MACHINE

NPU = MACHINE.npu
PLANES = {plane.name: plane.npu_gb_s for plane in MACHINE.planes}


@pytest.mark.parametrize(
    ("total", "expected", "within"),
    [
        pytest.param(MACHINE.npus, 384, 0, id="NPUs"),
        pytest.param(MACHINE.dies, 768, 0, id="dies"),
        pytest.param(MACHINE.cpus, 192, 0, id="CPUs"),
        pytest.param(MACHINE.dies * NPU.int8_tops_per_die / 1e3, 578, 0.5, id="INT8 POPS"),
        pytest.param(NPU.dies * NPU.int8_tops_per_die, 1504, 0, id="INT8 TOPS of an NPU"),
        pytest.param(NPU.dies * NPU.bf16_tflops_per_die, 707, 1, id="BF16 TFLOPS of an NPU"),
        pytest.param(MACHINE.npus * NPU.hbm_gb / 1e3, 49.2, 0.05, id="HBM TB"),
        pytest.param(MACHINE.npus * NPU.hbm_gb_s / 1e6, 1.23, 0.005, id="HBM PB/s"),
        pytest.param(NPU.die_to_die_gb_s * 2, 540, 0, id="die-to-die GB/s, both ways"),
        pytest.param(NPU.dies * NPU.cube_cores_per_die, 48, 0, id="cube cores"),
        pytest.param(NPU.dies * NPU.vector_cores_per_die, 96, 0, id="vector cores"),
        pytest.param(PLANES["UB"], 2 * 7 * 224 / 8, 0, id="UB: 2 dies x 7 links x 224 Gbps"),
        pytest.param(PLANES["UB"] * MACHINE.npus_per_node, 7 * 448, 0, id="UB: a node's 7 uplinks"),
        pytest.param(PLANES["RDMA"], 400 / 8, 0, id="RDMA: 400 Gbps"),
        pytest.param(PLANES["VPC"] * MACHINE.npus_per_node, 400 / 8, 0, id="VPC: 400 Gbps a node"),
    ],
)
def test_totals_are_the_papers(total: float, expected: float, within: float) -> None:
    assert abs(total - expected) <= within


def test_paths_within_and_across_nodes_are_those_of_table_1() -> None:
    near, far = MACHINE.within_node, MACHINE.across_nodes
    ratios = [
        far.read_gb_s / near.read_gb_s,
        far.write_gb_s / near.write_gb_s,
        far.read_us / near.read_us,
        far.write_us / near.write_us,
    ]
    assert [round(ratio, 2) for ratio in ratios] == [0.98, 0.99, 1.58, 1.62]


def test_npus_are_numbered_node_by_node() -> None:
    nodes = [MACHINE.node_of(npu) for npu in range(MACHINE.npus)]
    assert nodes == [node for node in range(48) for _ in range(8)]
