"""Strict JAX, 384 virtual devices and shape checks for every test.

Shapes in signatures (jaxtyping) are checked here and only here: users do not pay for it.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

# PEP 484: an int is a float
install_import_hook("cmx_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from support import BASE  # noqa: E402

from cmx_jax.mesh.host import enable_compilation_cache, request_devices  # noqa: E402
from cmx_jax.serving.deploy.model import Model  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
request_devices(384)
enable_compilation_cache()


@pytest.fixture(scope="session")
def base() -> Model:
    """One small model, read once."""
    return Model.read(BASE)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of several lengths for the model `base`."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 64, length).tolist() for length in (3, 17, 1, 32, 9, 5, 21, 12, 2)]
