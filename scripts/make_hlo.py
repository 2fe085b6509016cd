"""Write what the TPU compiler makes of tests/mesh/hlo_programs.py to tests/mesh/hlo, for test_hlo.py to read.

No TPU is needed, its compiler is (`pip install 'cmx_jax[tpu-aot]'`):

    python scripts/make_hlo.py

The tables of files and stack frames are left out of the texts.
"""

import os
import re
import sys
from pathlib import Path

# libtpu asks where it runs, unless it is told
os.environ |= {
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from mesh.hlo_programs import AXES, RANKS, WHOLE, compiled  # noqa: E402

TABLES = re.compile(r"\nFileNames\n.*?(?=\n%)", re.DOTALL)
ASYNC = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_all_to_all": True,
}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    for name in RANKS | WHOLE:
        # v5p can gather while it multiplies, and scatters what it sums
        topology = "v5p:2x2x2" if name in ("layers", "projection") else "v5e:2x4"
        options = ASYNC if name == "layers" else {}
        devices = topologies.get_topology_desc(topology, "tpu").devices
        mesh = Mesh(np.array(devices).reshape([size for _, size in AXES]), [axis for axis, _ in AXES])
        text = TABLES.sub("", compiled(name, mesh, **options))
        (ROOT / "tests" / "mesh" / "hlo" / f"tpu_{name}.txt").write_text(text)


if __name__ == "__main__":
    main()
