"""Strict JAX, 384 virtual devices and shape checks for every test.

Shapes in signatures (jaxtyping) are checked here and only here: users do not pay for it.
"""

import gc
import itertools
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most tests run a program a few times only: LLVM's optimisations take longer than they save. What XLA does to
# a program (fusion, collectives, layouts) stays the same; `make demo` and the benchmarks run optimised code.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
from jaxtyping import install_import_hook

# PEP 484: an int is a float
install_import_hook("cmx_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from support import BASE  # noqa: E402

from cmx_jax.mesh.host import enable_compilation_cache, request_devices  # noqa: E402
from cmx_jax.model import steps  # noqa: E402
from cmx_jax.serving.deploy.model import Model  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
request_devices(384)
enable_compilation_cache()


MAX_MAPPINGS = 30_000
"""Memory mappings from which compiled programs are dropped: Linux allows a process 65,530 by default, XLA:CPU
takes hundreds for a program, and crashes when there are no more."""

_MAPPINGS = Path("/proc/self/maps")
_finished = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Drops all compiled programs, every tenth test, if they have taken too many memory mappings."""
    if next(_finished) % 10 or not _MAPPINGS.exists():
        return
    if _MAPPINGS.read_bytes().count(b"\n") > MAX_MAPPINGS:
        steps._compile_steps.cache_clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def base() -> Model:
    """One small model, read once."""
    return Model.read(BASE)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of several lengths for the model `base`."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 64, length).tolist() for length in (3, 17, 1, 32, 9, 5, 21, 12, 2)]
