"""Helpers for tests of your own: virtual devices, meshes, runners, rank-coded inputs, collectives.

`plugin.py` is the pytest plugin; importing it, or this package, imports neither JAX nor NumPy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmx_jax.testing.assertions import assert_collectives
    from cmx_jax.testing.coded import rank_coded, where_from
    from cmx_jax.testing.same import assert_same

__all__ = ["assert_collectives", "assert_same", "rank_coded", "where_from"]


def __getattr__(name: str) -> Any:
    if name == "assert_collectives":  # loaded on first use, since it needs JAX
        from cmx_jax.testing import assertions as collectives

        return collectives.assert_collectives
    if name == "assert_same":
        from cmx_jax.testing import same

        return same.assert_same
    if name in __all__:
        from cmx_jax.testing import coded

        return getattr(coded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
