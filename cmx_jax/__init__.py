"""cmx_jax: CloudMatrix-Infer in JAX. Importing it starts no JAX backend.

>>> import cmx_jax
>>> model = cmx_jax.from_pretrained("tiny", runner="lanes", ranks=8)  # doctest: +SKIP
>>> model.generate(["The json module"], max_new_tokens=16)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from cmx_jax.errors import CmxError

if TYPE_CHECKING:
    from cmx_jax.serving.deploy.llm import LLM, from_pretrained

__version__ = "0.1.0"
__all__ = ["LLM", "CmxError", "__version__", "from_pretrained"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "from_pretrained"):  # loaded on first use: they need JAX
        from cmx_jax.serving.deploy import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
