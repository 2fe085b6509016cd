"""A decode step over many XLA host devices against its floor: its own collectives and nothing else.

    python scripts/bench_floor.py [--ranks 160] [--ranks-per-npu 1] [--exchange hierarchical] [--json]

The step is a decode step of the shipped model; `--recipe` takes that of `cmx demo`. The floor is a second
program, made by walking the step's jaxpr: every collective in it, with the same axes, shapes, types, count
and order, each waiting for the one before, and no arithmetic between them. Both run by turns, so that a busy
machine slows both; the ratio of their medians is what the arithmetic, and the dispatch of its operations on
every device, adds. Of ranks that share a device only what moves between devices counts. Where several do,
the step of one rank on each device runs by turns with the others.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from cmx_jax.mesh import enable_compilation_cache, expert_parallel, make_runner
from cmx_jax.mesh.exchange import EXCHANGES, WIRES
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.runners import Devices
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.deploy.recipe import Recipe
from cmx_jax.serving.deploy.recipe_layouts import recipe_layout
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.programs import Programs
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.request import SamplingParams

COLLECTIVES = {
    "all_gather",
    "all_gather_invariant",
    "all_to_all",
    "pmax",
    "pmin",
    "ppermute",
    "psum",
    "psum_invariant",
    "ragged_all_to_all",
    "reduce_scatter",
}

Key = tuple[tuple[int, ...], str]
"""Shape and type of one rank's array."""


@dataclass(frozen=True)
class Collective:
    """One collective as it stands in a jaxpr."""

    eqn: Any

    @property
    def ins(self) -> list[Key]:
        return [_key(v.aval) for v in self.eqn.invars]

    @property
    def outs(self) -> list[Key]:
        return [_key(v.aval) for v in self.eqn.outvars]

    @property
    def axes(self) -> str:
        axes = self.eqn.params.get("axes", self.eqn.params.get("axis_name"))
        return " ".join(map(str, axes)) if isinstance(axes, tuple | list) else str(axes)


@dataclass(frozen=True)
class Loop:
    """Collectives of a loop's body; `length` is None of a loop that runs as often as the data want."""

    length: int | None
    body: tuple["Collective | Loop", ...]


Plan = tuple[Collective | Loop, ...]


@dataclass
class Step:
    """A decode step at work: `call()` runs it once and waits; `rounds` of each exchange."""

    call: Callable[[], Any]
    serve: Callable[[], Any]
    jaxpr: Any
    rounds: list[int]
    runner: Devices


def build_step(layout: Layout, model: Model, sequences: int, steps: int, drafts: int = 0) -> Step:
    """A decode instance with `sequences` running sequences a rank.

    This is all that knows how the model is called.
    """
    ranks = layout.ranks
    runner = cast(Devices, make_runner("devices", layout.axes, 0, layout.ranks_per_npu))
    capacity = Capacity(sequences=sequences, pages=16 * sequences)
    one = model.instance("bench", layout, runner, capacity, drafts)
    programs = one.programs
    engine = Engine([one], one)
    prompt = model.encode("The json module")
    for _ in range(ranks * sequences):
        engine.submit(prompt, SamplingParams(max_tokens=(steps + 8) * (1 + drafts), ignore_eos=True))
    while engine.waiting:
        engine.step()
    (args, flags), outputs = _last_call(programs, engine)

    def call() -> None:
        programs.cache, output = programs.steps.decode(programs.weights, programs.cache, *args, **flags)
        jax.block_until_ready(output)

    jaxpr = jax.make_jaxpr(lambda w, cache: programs.steps.decode(w, cache, *args, **flags))(
        programs.weights, programs.cache
    )
    stats = outputs[1].stats
    rounds = [] if stats is None else np.asarray(stats.exchange.rounds)[:, 0].tolist()
    return Step(call, engine.step, jaxpr, rounds, Devices(runner.mesh))


def _last_call(programs: Programs, engine: Engine) -> tuple[tuple[Any, Any], Any]:
    """Arguments (behind weights and cache) and result of one decode step as the engine makes it."""
    decode, seen = programs.steps.decode, []

    def spy(weights: Any, cache: Any, *args: Any, **more: Any) -> Any:
        result = decode(weights, cache, *args, **more)
        seen.append(((args, more), result))
        return result

    programs.steps = _with(programs.steps, decode=spy)
    engine.step()
    programs.steps = _with(programs.steps, decode=decode)
    return seen[-1]


def _with(steps: Any, **fields: Any) -> Any:
    return type(steps)(**{**vars(steps), **fields})


def plan_of(jaxpr: Any) -> Plan:
    """The collectives of a jaxpr in order, nested in loops as they are there.

    Raises:
      ValueError: one stands where nobody knows how often it runs: in a branch, or a loop's condition.
    """
    plan: list[Collective | Loop] = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = tuple(part for sub in _jaxprs(eqn.params.values()) for part in plan_of(sub))
        if name in COLLECTIVES:
            plan.append(Collective(eqn))
        elif not inner:
            continue
        elif name == "while":
            if plan_of(eqn.params["cond_jaxpr"].jaxpr):
                raise ValueError("a collective in a loop's condition")
            plan.append(Loop(None, inner))
        elif name == "scan":
            plan.append(Loop(eqn.params["length"], inner))
        elif name == "cond":
            raise ValueError("a collective in a branch")
        else:
            plan += inner
    return tuple(plan)


def _jaxprs(values: Any) -> Iterator[Any]:
    """Jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _jaxprs(value)
        elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield getattr(value, "jaxpr", value)


def _key(aval: Any) -> Key:
    return aval.shape, str(aval.dtype)


def keys_of(plan: Plan) -> list[Key]:
    """Every shape and type that goes in or comes out, once."""
    found: dict[Key, None] = {}
    for part in plan:
        keys = keys_of(part.body) if isinstance(part, Loop) else [*part.ins, *part.outs]
        found |= dict.fromkeys(keys)
    return list(found)


def counted(plan: Plan, rounds: list[int]) -> dict[tuple[str, str, Key], int]:
    """How often each collective runs, by name, axes and operand."""
    table: dict[tuple[str, str, Key], int] = {}
    left = iter(rounds)

    def walk(plan: Plan) -> None:
        for part in plan:
            if isinstance(part, Loop):
                for _ in range(next(left) if part.length is None else part.length):
                    walk(part.body)
                continue
            for key in part.ins:
                row = (part.eqn.primitive.name, part.axes, key)
                table[row] = table.get(row, 0) + 1

    walk(plan)
    return table


def floor(plan: Plan) -> Callable[[tuple[Any, ...], Any], tuple[Any, ...]]:
    """The per-rank program `(buffers, rounds) -> buffers` of a plan.

    It holds one buffer of each of `keys_of`. A collective takes the buffers of its operands' shapes and
    leaves the results in theirs, so that equal shapes feed each other as they are; where the shape changes,
    one element of the result before goes into the next operand: the order stays, and nothing is free.
    """
    keys = keys_of(plan)

    def run(plan: Plan, state: Any, rounds: Any) -> Any:
        for part in plan:
            state = loop(part, state, rounds) if isinstance(part, Loop) else apply(part, state)
        return state

    def loop(part: Loop, state: Any, rounds: Any) -> Any:
        buffers, last, turn = state
        if part.length is None:
            turn += 1
        last = _element(last)

        def body(_: Any, carry: Any) -> Any:
            buffers, last, turn = run(part.body, carry, rounds)
            return buffers, _element(last), turn

        length = rounds[turn - 1] if part.length is None else part.length
        return jax.lax.fori_loop(0, length, body, (buffers, last, turn))

    def apply(part: Collective, state: Any) -> Any:
        buffers, last, turn = state
        operands = [_after(buffers[keys.index(key)], last) for key in part.ins]
        results = part.eqn.primitive.bind(*operands, **part.eqn.params)
        results = results if part.eqn.primitive.multiple_results else [results]
        for key, result in zip(part.outs, results, strict=True):
            i = keys.index(key)
            buffers = (*buffers[:i], result, *buffers[i + 1 :])
        return buffers, results[-1], turn

    def program(buffers: tuple[Any, ...], rounds: Any) -> tuple[Any, ...]:
        buffers = tuple(b[0] for b in buffers)
        buffers, _, _ = run(plan, (buffers, jnp.zeros(()), jnp.zeros((), jnp.int32)), rounds)
        return tuple(b[None] for b in buffers)

    return program


def _element(x: Any) -> Any:
    return x[(0,) * x.ndim].astype(jnp.float32)


def _after(x: Any, last: Any) -> Any:
    """`x`, not before `last` is there."""
    if x is last:
        return x
    one = jnp.broadcast_to(_element(last).astype(x.dtype), (1,) * x.ndim)
    return jax.lax.dynamic_update_slice(x, one, (0,) * x.ndim)


def build_floor(step: Step) -> tuple[Callable[[], None], Any]:
    """The floor of a step as a call, and the compiled program."""
    plan, devices = plan_of(step.jaxpr.jaxpr), step.runner.mesh.size
    specs = tuple(P(tuple(step.runner.mesh.shape)) for _ in keys_of(plan))
    program = step.runner.jit(floor(plan), (specs, P()), specs, donate_argnums=(0,))
    buffers = step.runner.put(tuple(np.ones((devices, *s), jnp.dtype(d)) for s, d in keys_of(plan)), specs)
    rounds = step.runner.put(np.array(step.rounds or [0], np.int32), P())
    state = [buffers]

    def call() -> None:
        state[0] = jax.block_until_ready(program(state[0], rounds))

    return call, counted(plan, step.rounds)


def by_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, run by turns, the first two turns for warmth."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t[2:])) * 1e3 for name, t in times.items()}


def measure(layout: Layout, model: Model, sequences: int, repeats: int, drafts: int = 0) -> dict[str, Any]:
    """The document that `--json` prints."""
    step = build_step(layout, model, sequences, repeats + 8, drafts)
    floor_call, table = build_floor(step)
    calls = {"floor": floor_call, "step": step.call, "served": step.serve}
    if layout.ranks_per_npu > 1:
        alone = expert_parallel(
            layout.ranks // layout.ranks_per_npu,
            model.config.n_routed_experts,
            exchange=layout.exchange,
            wire=layout.wire,
            mailbox_rows=layout.mailbox_rows,
            microbatches=layout.microbatches,
        )
        calls["one_rank"] = build_step(alone, model, sequences, repeats + 8, drafts).call
    times = by_turns(calls, repeats)
    return {
        "ranks": layout.ranks,
        "devices": step.runner.mesh.size,
        "exchange": layout.exchange,
        "wire": layout.wire,
        "microbatches": layout.microbatches,
        "sequences": sequences,
        "num_speculative_tokens": drafts,
        "rounds": step.rounds,
        **{f"{name}_ms": t for name, t in times.items()},
        "ratio": times["step"] / times["floor"],
        "collectives": [
            {"op": op, "axes": axes, "shape": list(shape), "dtype": dtype, "count": n}
            | {"bytes": n * math.prod(shape) * jnp.dtype(dtype).itemsize}
            for (op, axes, (shape, dtype)), n in table.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", action="store_true", help="the decode instance of cmx demo")
    parser.add_argument("--ranks", type=int, default=160)
    parser.add_argument("--ranks-per-npu", type=int, default=1)
    parser.add_argument("--exchange", choices=sorted(EXCHANGES), default="hierarchical")
    parser.add_argument("--wire", choices=WIRES)
    parser.add_argument("--sequences", type=int, default=1, help="running sequences a rank")
    parser.add_argument("--num-speculative-tokens", type=int, default=0, help="MTP drafts")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    enable_compilation_cache()
    drafts, sequences, model = args.num_speculative_tokens, args.sequences, Model.read("tiny")
    layout = expert_parallel(
        args.ranks,
        model.config.n_routed_experts,
        ranks_per_npu=args.ranks_per_npu,
        exchange=args.exchange,
        wire=args.wire or model.dtype,
    )
    if args.recipe:
        recipe = Recipe()
        model = Model.read("tiny", recipe.engine.dtype, recipe.engine.quant)
        layout = recipe_layout(recipe, "decode", model.config, model.dtype)
        drafts, sequences = recipe.engine.num_speculative_tokens or 0, recipe.sequences
    result = measure(layout, model, sequences, args.repeats, drafts)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(
        "{ranks} ranks on {devices} devices, {exchange}, {wire}, {sequences} sequence(s) a rank".format(
            **result
        )
    )
    for row in result["collectives"]:
        print("  {count:>3} x {op} over {axes}: {dtype}{shape}".format(**row))
    print("floor  {floor_ms:7.1f} ms: these collectives alone".format(**result))
    print("step   {step_ms:7.1f} ms: {ratio:.2f} x the floor".format(**result))
    print("served {served_ms:7.1f} ms: with batches and tokens to and from the host".format(**result))
    if "one_rank_ms" in result:
        ratio = result["step_ms"] / result["one_rank_ms"]
        print(f"one    {result['one_rank_ms']:7.1f} ms: one rank a device; {ratio:.2f} x that is the step")


if __name__ == "__main__":
    main()
