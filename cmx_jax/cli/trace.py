"""`cmx trace`: the collectives of a model's step or of any function, and a check against a baseline."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """Adds the verb and its flags."""
    verb = verbs.add_parser("trace", help="trace the collectives of a program, at full size, without weights")
    verb.set_defaults(run=_trace)
    model = "checkpoint directory, tiny, or a preset such as deepseek-r1"
    verb.add_argument("model", metavar="MODEL", nargs="?", help=model)
    layouts = (
        "layout: ep320, ep32 (the paper's), h800-ep144, h800-ep32 (DeepSeek's), tp, tp-ep, ag-rs, auto, or "
        "epN, tpN, tp-epN, ag-rsN, autoN (default ep320)"
    )
    verb.add_argument("--layout", default="ep320", help=layouts)
    verb.add_argument(
        "--step",
        choices=("decode", "prefill"),
        help="step to trace (default: the one that the layout is for)",
    )
    verb.add_argument("--batch", type=int, help="sequences per NPU (default: the paper's)")
    contexts = "tokens per sequence (default 4096, or the model's limit if less)"
    verb.add_argument("--context", type=int, help=contexts)
    verb.add_argument(
        "--quant",
        default="none",
        choices=("none", "int8"),
        help="quantization of weights (default none: BF16)",
    )
    verb.add_argument(
        "--num-speculative-tokens", type=int, default=0, help="MTP drafts per decode step (default 0)"
    )

    function = verb.add_argument_group("instead of MODEL, a function of your own")
    function.add_argument("--function", metavar="MODULE:NAME", help="function to trace with --args on --mesh")
    args = (
        "each argument as dtype[shape]@axes, such as float32[64,4096]@-,x; or MODULE:NAME of a function that "
        "returns all"
    )
    function.add_argument("--args", nargs="+", default=[], metavar="ARG", help=args)
    mesh = (
        "mesh that --args lie on: axes and sizes such as node=4,npu=8 (npu=8:explicit for explicit "
        "shardings), or MODULE:NAME of a mesh of your own"
    )
    function.add_argument("--mesh", metavar="AXES", help=mesh)
    function.add_argument(
        "--devices", type=int, default=0, help="number of virtual devices, for a mesh of your own"
    )

    sources = "form of the program to read: jaxpr (as written, default), stablehlo, or hlo (as compiled)"
    verb.add_argument("--source", default="jaxpr", help=sources)
    target = (
        "target of the compiler, for --source hlo: cpu (default), or a TPU topology such as v5p:8x8x6 or "
        "tpu7x:4x8x12"
    )
    verb.add_argument("--target", default="cpu", help=target)
    verb.add_argument(
        "--dump", type=Path, metavar="DIR", help="write the program's texts and a Perfetto trace to DIR"
    )
    verb.add_argument("--save", type=Path, metavar="FILE", help="save the collectives as a baseline")
    verb.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="fail (exit code 1) if the collectives differ from the baseline",
    )
    add_json(verb)


def _trace(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.function is None):
        raise CmxError("expected a model, or --function MODULE:NAME, one of them")
    if args.target != "cpu" and args.source == "jaxpr":
        raise CmxError(f"--target {args.target} needs --source hlo (or stablehlo): a jaxpr has no target")
    os.environ.setdefault(
        "JAX_PLATFORMS", "cpu"
    )  # nothing runs; starting an accelerator would only take time
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
    from cmx_jax.analysis.trace.trace_model import trace_model
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
    settings = {
        "model": args.model,
        "layout": args.layout,
        "about": found.about,
        "step": step,
        "batch": batch,
    }
    settings |= {"context": context, "quant": args.quant, "target": args.target, "ranks": layout.ranks}
    return settings | {"num_speculative_tokens": args.num_speculative_tokens}, result


def _of_function(args: argparse.Namespace) -> Any:
    from cmx_jax.mesh import request_devices
    from cmx_jax.mesh.trace.function import trace_function

    if args.devices:
        request_devices(args.devices)
    options = {"source": args.source, "target": args.target, "dump": args.dump}
    result = trace_function(args.function, args.args, args.mesh, **options)
    return {"function": args.function, "args": args.args, "mesh": args.mesh, "target": args.target}, result


IDENTITY = (
    "model", "layout", "step", "batch", "context", "quant", "num_speculative_tokens",
    "function", "args", "mesh", "source", "target",
)  # fmt: skip


def _save(path: Path, document: dict[str, object]) -> None:
    """Saves the program's identity and collectives: to a temporary file, which then replaces `path`."""
    kept = {name: document[name] for name in (*IDENTITY, "collectives") if name in document}
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written.write_text(json.dumps(kept, indent=1) + "\n")
        written.replace(path)
    except OSError as error:
        raise CmxError(f"--save {path}: {error.strerror}; give a file that can be written") from None


def _read_baseline(path: Path) -> dict[str, Any]:
    try:
        baseline = json.loads(path.read_text())
        if not all({"op", "axes", "count", "wire_bytes"} <= set(row) for row in baseline["collectives"]):
            raise KeyError("collectives")
    except OSError as error:
        raise CmxError(f"--check {path}: {error.strerror}; make it with --save {path}") from None
    except (ValueError, KeyError, TypeError):
        raise CmxError(f"--check {path}: no baseline; make one with --save {path}") from None
    return dict(baseline)


def _check(args: argparse.Namespace, baseline: dict[str, Any], document: dict[str, Any]) -> int:
    """Returns exit code 1 and shows the differences if the collectives are not the baseline's."""
    from cmx_jax.mesh.trace import differences

    other = [n for n in IDENTITY if n in baseline and baseline[n] != document.get(n)]
    if other:
        was = ", ".join(f"{name} {baseline[name]!r} (now {document.get(name)!r})" for name in other)
        raise CmxError(f"--check {args.check} is of another program: {was}")
    rows = differences(baseline["collectives"], document["collectives"], ("baseline", "now"))
    result = {"check": str(args.check), "equal": not rows, "differences": rows}
    equal = f"{args.check}: the {len(document['collectives'])} collectives are the baseline's"
    update = f"{args.check}: the collectives have changed; if that is meant, --save {args.check}"
    show(result, args.json, lambda r: "\n".join([*rows, update] if rows else [equal]))
    return 1 if rows else 0
