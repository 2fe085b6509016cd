"""Small programs on 8 devices, a mesh of axes a = 2 and b = 4, of which anybody can say what they send.

`test_hlo.py` compiles them for CPU; `scripts/make_hlo.py` compiled them for TPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = (("a", 2), ("b", 4))
ALL = P(("a", "b"))
RING = [(i, (i + 1) % 4) for i in range(4)]

Program = Callable[..., Any]
Arg = tuple[tuple[int, ...], Any, P]  # of the whole array


def exchange(x: jax.Array, w: jax.Array) -> jax.Array:
    """Seven times: 8 x 64 rows of 256 move over b and meet w [256, 256]."""

    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        with jax.named_scope("Moe"):
            with jax.named_scope("Dispatch"):
                x = jax.lax.all_to_all(x, "b", 0, 0, tiled=True)
            with jax.named_scope("MLP"):
                return x @ w, None

    return jax.lax.scan(body, x, None, length=7)[0]


def mixed(x: jax.Array) -> jax.Array:
    """One of each on x [64, 128], over a, over b, and two sums over both that may be combined."""
    with jax.named_scope("Reduce"):
        s = jax.lax.psum(x, "a")
        t, u = jax.lax.psum((x * 2, x + 1), ("a", "b"))
    with jax.named_scope("Gather"):
        g = jax.lax.all_gather(x, "b", tiled=True)
    with jax.named_scope("Scatter"):
        r = jax.lax.psum_scatter(jnp.sin(g), "b", tiled=True)
    with jax.named_scope("Ring"):
        p = jax.lax.ppermute(x, "b", RING)
    with jax.named_scope("Line"):
        q = jax.lax.ppermute(x, "b", RING[:-1])
    return s + t + u + r + p + q


def nested(x: jax.Array, n: jax.Array) -> jax.Array:
    """Runs nested loops and branches on x [64, 128].

    Five times: three times either of two equal sums over a, then perhaps a gather over b. Then sums over b
    until data end it.
    """

    def inner(i: jax.Array, x: jax.Array) -> jax.Array:
        up = x.sum() > i.astype(x.dtype)
        return jax.lax.cond(up, lambda x: jax.lax.psum(x, "a"), lambda x: jax.lax.psum(x * 2, "a"), x)

    def outer(i: jax.Array, x: jax.Array) -> jax.Array:
        x = jax.lax.fori_loop(0, 3, inner, x)
        gathered = lambda x: jax.lax.all_gather(x, "b", tiled=True).sum() + x  # noqa: E731
        return jax.lax.cond(x.sum() > i.astype(x.dtype), gathered, lambda x: x, x)

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state[0] + 1, jax.lax.psum(jnp.sin(state[1]), "b")

    x = jax.lax.fori_loop(0, 5, outer, x)
    return jax.lax.while_loop(lambda state: state[0] < n, again, (jnp.int32(0), x))[1]


def layers(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Six layers with x [1024, 2048], up [512, 8192] and down [2048, 2048] on each rank: weights are gathered
    over b, results scattered and gathered over a.
    """

    def body(x: jax.Array, w: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        with jax.named_scope("Up"):
            y = jax.nn.relu(x @ jax.lax.all_gather(w[0], "b", axis=0, tiled=True))
        with jax.named_scope("Down"):
            y = y @ jax.lax.all_gather(w[1], "b", axis=0, tiled=True)
        with jax.named_scope("Sum"):
            y = jax.lax.psum_scatter(y, "a", scatter_dimension=0, tiled=True)
            y = jax.lax.all_gather(y, "a", axis=0, tiled=True)
        with jax.named_scope("Swap"):
            return x + jax.lax.all_to_all(y, "b", 0, 0, tiled=True), None

    return jax.lax.scan(body, x, (up, down))[0]


def products(q: jax.Array, k: jax.Array, codes: jax.Array, image: jax.Array, kernel: jax.Array) -> tuple:
    """16 batched products, one of INT8, and a 3 x 3 convolution with padding."""
    scores = jnp.einsum("thd,shd->hts", q, k)
    exact = jax.lax.dot_general(codes, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return scores, exact, jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME")


def mlp(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Multiplies matrices for which the compiler inserts a sum over b."""
    return jax.nn.relu(x @ up) @ down


def projection(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies x [512, 512] by w [512, 2048] on each rank; of the sums over b a rank keeps its columns."""
    with jax.named_scope("Project"):
        return x @ w


def _whole(shape: tuple[int, ...], dtype: Any) -> Arg:
    return (8 * shape[0], *shape[1:]), dtype, ALL


RANKS: dict[str, tuple[Program, tuple[Arg, ...], P]] = {  # of one rank
    "exchange": (exchange, (_whole((8, 64, 256), jnp.float32), ((256, 256), jnp.float32, P())), ALL),
    "mixed": (mixed, (_whole((64, 128), jnp.float32),), ALL),
    "nested": (nested, (_whole((64, 128), jnp.float32), ((), jnp.int32, P())), ALL),
    "layers": (
        layers,
        (
            _whole((1024, 2048), jnp.bfloat16),
            ((6, 2048, 8192), jnp.bfloat16, P(None, "b")),
            ((6, 8192, 2048), jnp.bfloat16, P(None, "b")),
        ),
        ALL,
    ),
    "products": (
        products,
        (
            _whole((128, 16, 64), jnp.float32),
            _whole((256, 16, 64), jnp.float32),
            _whole((128, 512), jnp.int8),
            _whole((2, 32, 16, 24), jnp.float32),
            ((64, 32, 3, 3), jnp.float32, P()),
        ),
        ALL,
    ),
}
WHOLE: dict[str, tuple[Program, tuple[Arg, ...], P]] = {  # of whole arrays
    "mlp": (
        mlp,
        (
            ((256, 512), jnp.float32, P("a", None)),
            ((512, 1024), jnp.float32, P(None, "b")),
            ((1024, 512), jnp.float32, P("b", None)),
        ),
        P("a", None),
    ),
    "projection": (
        projection,
        (((1024, 2048), jnp.bfloat16, P("a", "b")), ((2048, 2048), jnp.bfloat16, P("b", None))),
        P("a", "b"),
    ),
}


def traced(name: str, mesh: Mesh) -> jax.stages.Traced:
    """Traces a program for a mesh of devices, before any compiler."""
    program, args, result = (RANKS | WHOLE)[name]
    arguments = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, spec)) for s, t, spec in args]
    if name in WHOLE:
        return jax.jit(program, out_shardings=NamedSharding(mesh, result)).trace(*arguments)
    specs = tuple(spec for _, _, spec in args)
    spread = partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)
    return jax.jit(spread(program)).trace(*arguments)


def compiled(name: str, mesh: Mesh, **options: Any) -> str:
    """Compiles a program and returns its optimised HLO."""
    return traced(name, mesh).lower().compile(compiler_options=options or None).as_text()
