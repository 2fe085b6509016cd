"""`cmx trace --function`: functions that are not ours, and every mistake in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmx_jax.cli import main
from cmx_jax.errors import CmxError
from cmx_jax.mesh.jax_versions import auto_mesh
from cmx_jax.mesh.trace.function import read_args, trace_function

MINE = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P

def ring(x):
    def turn(x, _):
        return jax.lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)]), None
    turns = lambda x: jax.lax.scan(turn, x, None, length=4)[0]
    return jax.shard_map(turns, in_specs=P("x"), out_specs=P("x"))(x)

OWN = jax.sharding.Mesh(jax.devices()[:4], ("y",))

def brings_its_mesh(x):
    return jax.shard_map(lambda x: jax.lax.psum(x, "y"), mesh=OWN, in_specs=P("y"), out_specs=P())(x)

def shapes():
    return jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)

def broken(x):
    raise TypeError("of no use\\nand more")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize("args", [["bfloat16[8,16]@x"], ["shapes"]])
def test_module_in_current_folder(mine: str, args: list[str]) -> None:
    texts = [f"{mine}:{arg}" if arg == "shapes" else arg for arg in args]
    result = trace_function(f"{mine}:ring", texts, "x=4")
    assert [(r["op"], r["axes"], r["count"], r["wire_bytes"]) for r in result.collectives] == [
        ("permute", ["x"], 4, 4 * 2 * 16 * 2)
    ]


@pytest.mark.parametrize("source", ["jaxpr", "stablehlo", "hlo"])
def test_function_with_own_mesh(mine: str, source: str) -> None:
    result = trace_function(f"{mine}:brings_its_mesh", ["float32[8,16]"], source=source)
    (only,) = result.collectives
    assert (only["op"], only["axes"], only["wire_bytes"]) == ("all_reduce", ["y"], 2 * 2 * 16 * 4 * 3 / 4)


def test_library_function_has_compiler_collectives(capsys: pytest.CaptureFixture[str]) -> None:
    """A loss whose classes lie on eight ranks: a maximum and two sums over them, and the label's logit."""
    name = "optax.losses:softmax_cross_entropy_with_integer_labels"
    options = ["--mesh", "x=8", "--args", "float32[64,4096]@-,x", "int32[64]"]
    assert main(["trace", "--function", name, *options, "--source", "hlo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {(r["op"], tuple(r["axes"]), tuple(r["shape"])) for r in result["collectives"]} >= {
        ("all_reduce", ("x",), (64,))
    }
    assert result["mesh"] == "x=8"


@pytest.mark.parametrize(
    ("name", "args", "mesh", "message"),
    [
        ("nothing", [], None, "function 'nothing', expected package.module:function"),
        ("no_such_module:f", [], None, "no_such_module:f: ModuleNotFoundError"),
        ("jax.numpy:no_such", [], None, "AttributeError"),
        ("jax.numpy:pi", [], None, "jax.numpy:pi is a float, expected a function"),
        ("jax.numpy:sin", ["float32[4"], None, r"argument 'float32\[4', expected dtype\[shape\]"),
        ("jax.numpy:sin", ["float33[4]"], None, r"argument 'float33\[4\]'"),
        ("jax.numpy:sin", ["float32[4]@y"], "x=2", r"no axis 'y', expected one of \['x'\]"),
        ("jax.numpy:sin", ["float32[5]@x"], "x=2", "5 does not divide over 2 ranks"),
        ("jax.numpy:sin", ["float32[4]@x,x"], "x=2", r"argument 'float32\[4\]@x,x'"),
        ("jax.numpy:sin", ["float32[4]"], "x=two", "mesh 'x=two', expected different axes and sizes"),
        ("jax.numpy:matmul", ["float32[4,3]", "float32[4,3]"], None, "TypeError: dot_general requires"),
    ],
)
def test_mistake_is_one_line(name: str, args: list[str], mesh: str | None, message: str) -> None:
    with pytest.raises(CmxError, match=message) as caught:
        trace_function(name, args, mesh)
    assert "\n" not in str(caught.value)


def test_failing_line_of_function_is_named(mine: str) -> None:
    with pytest.raises(CmxError, match=rf"{mine}:broken: TypeError: of no use \({mine}.py:20\)"):
        trace_function(f"{mine}:broken", ["float32[1]"])


def test_argument_over_two_axes() -> None:
    mesh = auto_mesh((("a", 2), ("b", 4)))
    (result,) = read_args(["int8[16,3]@a+b"], mesh)
    assert result.sharding.shard_shape(result.shape) == (2, 3)


EXPLICIT = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:8])

def total(x):
    return jax.shard_map(lambda a: jax.lax.psum(a, "y"), mesh=mesh, in_specs=P("x", "y"), out_specs=P("x"))(x)

def gathered(x):
    return jax.sharding.reshard(x @ x.sum(0), P())
"""


@pytest.fixture
def explicit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"explicit_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(EXPLICIT)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("source", ["jaxpr", "stablehlo", "hlo"])
def test_arguments_on_a_mesh_of_the_module(explicit: str, source: str) -> None:
    result = trace_function(f"{explicit}:total", ["float32[8,16]@x,y"], f"{explicit}:mesh", source=source)
    (only,) = result.collectives
    assert (only["op"], only["axes"], only["shape"]) == ("all_reduce", ["y"], [4, 4])


@pytest.mark.parametrize("mesh", ["x=2:explicit,y=4:explicit", "x=2:explicit,y=4"])
def test_explicit_axes_of_a_mesh_by_sizes(explicit: str, mesh: str) -> None:
    result = trace_function(f"{explicit}:gathered", ["float32[8,16]@x"], mesh)
    assert any("1 x reshard" in note for note in result.notes)


def test_argument_that_is_not_placed_says_how_to_place_it(explicit: str) -> None:
    with pytest.raises(
        CmxError, match=r"total: in_specs passed .*dtype\[shape\]@axes on --mesh places it"
    ) as error:
        trace_function(f"{explicit}:total", ["float32[8,16]"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("jax.numpy:pi", "mesh jax.numpy:pi is a float, expected a jax.sharding.Mesh"),
        ("jax.numpy:no_such", "AttributeError"),
        ("x=2:manual", "expected different axes and sizes such as node=4,npu=8"),
    ],
)
def test_mesh_mistake_is_one_line(mesh: str, message: str) -> None:
    with pytest.raises(CmxError, match=message) as error:
        trace_function("jax.numpy:sin", ["float32[4]"], mesh)
    assert "\n" not in str(error.value)


MODULE_WITH_MESH = """
import jax
from jax.sharding import PartitionSpec as P

mesh = jax.make_mesh((2, 4), ("x", "y"))

def total(x):
    return jax.shard_map(lambda a: jax.lax.psum(a, "z"), in_specs=P("x"), out_specs=P("x"))(x)
"""


def test_module_that_makes_a_mesh_gets_its_devices(tmp_path: Path) -> None:
    """In a process of its own, as JAX has started here; the axis that does not exist is hinted at."""
    (tmp_path / "with_mesh.py").write_text(MODULE_WITH_MESH)
    command = [sys.executable, "-m", "cmx_jax.cli", "trace", "--function", "with_mesh:total"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(*options: str) -> str:
        done = subprocess.run(
            [*command, "--args", "float32[8,16]@x", *options],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        [line] = done.stderr.strip().splitlines()
        return line

    assert "is the axis of each collective one of the mesh's axes?" in run("--mesh", "x=2,y=4")
    assert "--devices N asks for N virtual devices" in run("--mesh", "with_mesh:mesh")
