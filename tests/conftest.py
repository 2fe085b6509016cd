"""Strict JAX, 384 virtual devices and shape checks for every test.

Shapes in signatures (jaxtyping) are checked here and only here: users do not pay for it.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

# PEP 484: an int is a float
install_import_hook("cmx_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from cmx_jax.mesh.host import enable_compilation_cache, request_devices  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
request_devices(384)
enable_compilation_cache()
