"""The caching pool (section 4.4, the paper's EMS): blocks of bytes by key, DRAM over disk, on many servers.

An application has a `Pool`, which has one or more `Store`s: an `MPServer` in this process, a `RemoteStore`
that asks one elsewhere (`serve`), or a client in `valkey.py` or `mooncake.py`, which are imported only by
name. `keys.py` makes the keys of context blocks, `models.py` cuts models into blocks. Nothing here depends on
JAX.
"""

from cmx_jax.serving.ems.cache_server import MPServer
from cmx_jax.serving.ems.keys import BLOCK, Fingerprint, chain, root
from cmx_jax.serving.ems.listener import CacheServer, serve
from cmx_jax.serving.ems.models import Loaded, load_model, store_model
from cmx_jax.serving.ems.pool import Pool, Ring
from cmx_jax.serving.ems.remote import RemoteStore
from cmx_jax.serving.ems.store import Hit, Store

__all__ = [
    "BLOCK",
    "CacheServer",
    "Fingerprint",
    "Hit",
    "Loaded",
    "MPServer",
    "Pool",
    "RemoteStore",
    "Ring",
    "Store",
    "chain",
    "load_model",
    "root",
    "serve",
    "store_model",
]
