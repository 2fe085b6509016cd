"""`cmx trace`: what a model's step or anyone's function moves, and a guard against change."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """The verb and its flags."""
    verb = verbs.add_parser("trace", help="what a program's collectives move, at full size, without weights")
    verb.set_defaults(run=_trace)
    model = "a directory, tiny, or a preset such as deepseek-r1"
    verb.add_argument("model", metavar="MODEL", nargs="?", help=model)
    layouts = (
        "ep320, ep32 (the paper's), h800-ep144, h800-ep32 (DeepSeek's), tp, tp-ep, ag-rs, auto, or epN, tpN, "
        "tp-epN, ag-rsN, autoN (default ep320)"
    )
    verb.add_argument("--layout", default="ep320", help=layouts)
    verb.add_argument("--step", choices=("decode", "prefill"), help="default: what the layout is for")
    verb.add_argument("--batch", type=int, help="sequences of an NPU (default: the paper's)")
    contexts = "tokens of a sequence (default 4096, or what the model has)"
    verb.add_argument("--context", type=int, help=contexts)
    verb.add_argument(
        "--quant", default="none", choices=("none", "int8"), help="weights (default none: BF16)"
    )
    verb.add_argument("--num-speculative-tokens", type=int, default=0, help="MTP drafts (default 0)")

    function = verb.add_argument_group("instead of MODEL, a function of your own")
    function.add_argument("--function", metavar="MODULE:NAME", help="traced with --args on --mesh")
    args = (
        "dtype[shape]@axes of each argument, such as float32[64,4096]@-,x; or MODULE:NAME that returns them"
    )
    function.add_argument("--args", nargs="+", default=[], metavar="ARG", help=args)
    mesh = (
        "mesh that --args lie on: axes and sizes such as node=4,npu=8 (npu=8:explicit for explicit "
        "shardings), or MODULE:NAME of a mesh of your own"
    )
    function.add_argument("--mesh", metavar="AXES", help=mesh)
    function.add_argument("--devices", type=int, default=0, help="virtual devices, for its own mesh")

    sources = "jaxpr (what was written, default), stablehlo, or hlo (what the compiler made of it)"
    verb.add_argument("--source", default="jaxpr", help=sources)
    target = "for hlo: cpu (default) or a TPU topology such as v5p:8x8x6 or tpu7x:4x8x12"
    verb.add_argument("--target", default="cpu", help=target)
    verb.add_argument("--dump", type=Path, metavar="DIR", help="the program's texts and a Perfetto trace")
    verb.add_argument("--save", type=Path, metavar="FILE", help="keeps the collectives as a baseline")
    verb.add_argument(
        "--check", type=Path, metavar="FILE", help="fails (exit 1) if they are not the baseline's"
    )
    add_json(verb)


def _trace(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.function is None):
        raise CmxError("expected a model, or --function MODULE:NAME, one of them")
    if args.target != "cpu" and args.source == "jaxpr":
        raise CmxError(f"--target {args.target} needs --source hlo (or stablehlo): a jaxpr is of no target")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs; an accelerator would only cost its start
    baseline = _read_baseline(args.check) if args.check else None
    document, result = _of_function(args) if args.function else _of_model(args)
    document |= result.as_dict()
    if args.save:
        _save(args.save, document)
    if baseline is None:
        from cmx_jax.mesh.trace.table import render

        show(document, args.json, lambda _: render(result))
        return 0
    return _check(args, baseline, document)


def _of_model(args: argparse.Namespace) -> Any:
    from cmx_jax.analysis.trace.model import trace_model
    from cmx_jax.mesh.named_layouts import named_layout
    from cmx_jax.model.weights import int8_fields
    from cmx_jax.serving.deploy.model import config_of

    c, found = config_of(args.model), named_layout(args.layout)
    c = replace(c, int8=int8_fields(c)) if args.quant == "int8" else c
    layout, step = found.make(c.n_routed_experts), args.step or found.step
    batch = found.batch if args.batch is None else args.batch
    context = min(4096, c.max_position_embeddings) if args.context is None else args.context
    result = trace_model(
        c,
        layout,
        step,
        batch=batch,
        context=context,
        drafts=args.num_speculative_tokens,
        ranks_per_npu=found.ranks_per_npu,
        machine=found.machine,
        source=args.source,
        target=args.target,
        dump=args.dump,
    )
    given = {"model": args.model, "layout": args.layout, "about": found.about, "step": step, "batch": batch}
    given |= {"context": context, "quant": args.quant, "target": args.target, "ranks": layout.ranks}
    return given | {"num_speculative_tokens": args.num_speculative_tokens}, result


def _of_function(args: argparse.Namespace) -> Any:
    from cmx_jax.mesh import request_devices
    from cmx_jax.mesh.trace.function import trace_function

    if args.devices:
        request_devices(args.devices)
    given = {"source": args.source, "target": args.target, "dump": args.dump}
    result = trace_function(args.function, args.args, args.mesh, **given)
    return {"function": args.function, "args": args.args, "mesh": args.mesh, "target": args.target}, result


IDENTITY = (
    "model", "layout", "step", "batch", "context", "quant", "num_speculative_tokens",
    "function", "args", "mesh", "source", "target",
)  # fmt: skip


def _save(path: Path, document: dict[str, Any]) -> None:
    """What was traced, and its collectives: in a file of its own, then in place."""
    kept = {name: document[name] for name in (*IDENTITY, "collectives") if name in document}
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written.write_text(json.dumps(kept, indent=1) + "\n")
        written.replace(path)
    except OSError as error:
        raise CmxError(f"--save {path}: {error.strerror}; give a file that can be written") from None


def _read_baseline(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not all({"op", "axes", "count", "wire_bytes"} <= set(row) for row in found["collectives"]):
            raise KeyError("collectives")
    except OSError as error:
        raise CmxError(f"--check {path}: {error.strerror}; make it with --save {path}") from None
    except (ValueError, KeyError, TypeError):
        raise CmxError(f"--check {path}: no baseline; make one with --save {path}") from None
    return dict(found)


def _check(args: argparse.Namespace, baseline: dict[str, Any], document: dict[str, Any]) -> int:
    """Exit code 1, and how they differ, if the collectives are not the baseline's."""
    from cmx_jax.mesh.trace import differences

    other = [n for n in IDENTITY if n in baseline and baseline[n] != document.get(n)]
    if other:
        was = ", ".join(f"{name} {baseline[name]!r} (now {document.get(name)!r})" for name in other)
        raise CmxError(f"--check {args.check} is of another program: {was}")
    found = differences(baseline["collectives"], document["collectives"], ("baseline", "now"))
    result = {"check": str(args.check), "equal": not found, "differences": found}
    equal = f"{args.check}: the {len(document['collectives'])} collectives are the baseline's"
    update = f"{args.check}: the collectives have changed; if that is meant, --save {args.check}"
    show(result, args.json, lambda r: "\n".join([*found, update] if found else [equal]))
    return 1 if found else 0
