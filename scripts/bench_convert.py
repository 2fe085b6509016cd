"""Peak memory and speed of `cmx convert` and `cmx quantize` on a synthetic checkpoint, printed as multiples
of its largest layer.

    python scripts/bench_convert.py [--gib 2] [--keep DIR] [--json]

A Qwen3-MoE-shaped BF16 checkpoint of random numbers is written, then converted by child processes: to BF16
and INT8 safetensors and to Orbax, and from INT8 to BF16; and quantised with calibration. What counts is the
child's largest resident set less what it had after its imports. Of quantising it is also said what part
of that is programs and probabilities (taken on next to no weights too) and the text's hidden states.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cmx_jax.model.checkpoint.names import Source, sources
from cmx_jax.model.checkpoint.writer import Entry, write_file
from cmx_jax.model.families import parse_config
from cmx_jax.model.weights import int8_fields

LAYERS, EXPERTS, WIDTH = 8, 64, 1024
VOCABULARY, TOKENS = 8192, 1024
QUANTIZE, PROGRAMS = f"quantize, {TOKENS:,} tokens", "the same of 1 MiB"
SMALL = {  # the same programs
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "head_dim": 4,
    "moe_intermediate_size": 8,
    "num_experts": 8,
    "num_hidden_layers": 1,
}
RUNS = {
    "bfloat16 safetensors": ("source", {"dtype": "bfloat16"}),
    "int8 safetensors": ("source", {"dtype": "int8"}),
    "orbax for ep16": ("source", {"format": "orbax", "ranks": 16}),
    "int8 to bfloat16": ("int8 safetensors", {"dtype": "bfloat16"}),
    PROGRAMS: ("small source", {"tokens": TOKENS}),
    QUANTIZE: ("source", {"tokens": TOKENS}),
}
CHILD = f"""
import json, resource, sys
import orbax.checkpoint
import numpy as np
from cmx_jax.model.checkpoint.convert import convert
from cmx_jax.model.quantize.command import quantize
def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024
before = resident()
fields = json.loads(sys.argv[3])
if "tokens" in fields:
    tokens = np.random.default_rng(0).integers(0, {VOCABULARY}, fields["tokens"]).reshape(-1, 256)
    quantize(sys.argv[1], sys.argv[2], tokens=tokens)
else:
    convert(sys.argv[1], sys.argv[2], **fields)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"before": before, "peak": peak}}))
"""


def config(gib: float) -> dict[str, Any]:
    """A config whose BF16 weights take `gib` GiB."""
    hidden = int(gib * 2**30 / 2 / LAYERS / EXPERTS / WIDTH / 3)
    return {
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2048,
        "moe_intermediate_size": hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }


def write_source(directory: Path, raw: dict[str, Any]) -> int:
    """Random weights, a file a layer; returns the bytes of the largest layer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw))
    by_unit: dict[str, list[Source]] = {}
    for s in sources(parse_config(raw), mtp=False):
        by_unit.setdefault(s.unit, []).append(s)
    rng, largest = np.random.default_rng(0), 0
    for unit, tensors in by_unit.items():
        entries = [Entry(s.name, "bfloat16", s.shape) for s in tensors]
        arrays = (
            (s.name, rng.standard_normal(s.shape, np.float32).astype(ml_dtypes.bfloat16)) for s in tensors
        )
        write_file(directory / f"{unit}.safetensors", entries, arrays)
        if unit != "top":
            largest = max(largest, sum(entry.nbytes for entry in entries))
    return largest


def activations(raw: dict[str, Any]) -> int:
    """Bytes of hidden states while it is measured what rounding a field costs: those without and with each
    field rounded, what they give to the experts, and the experts' answers."""
    variants = 1 + len(int8_fields(parse_config(raw)))
    return 3 * variants * TOKENS * raw["hidden_size"] * np.dtype(np.float32).itemsize


def run(source: Path, destination: Path, fields: dict[str, Any]) -> dict[str, float]:
    """One conversion in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(source), str(destination), json.dumps(fields)]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"seconds": time.perf_counter() - start, **json.loads(done.stdout)}


def bench(directory: Path, gib: float) -> dict[str, Any]:
    """All runs over one checkpoint."""
    raw = config(gib)
    largest = write_source(directory / "source", raw)
    write_source(directory / "small source", raw | SMALL)
    size = sum(path.stat().st_size for path in (directory / "source").iterdir())
    rows: list[dict[str, Any]] = []
    for name, (source, fields) in RUNS.items():
        found = run(directory / source, directory / name, fields)
        grown = found["peak"] - found["before"]
        rows.append(
            {"run": name, "grown": grown, "layers": grown / largest, "rate": size / found["seconds"], **found}
        )
    rows[-1] |= {"programs": rows.pop(-2)["grown"], "activations": activations(raw)}
    return {"bytes": size, "largest_layer": largest, "runs": rows}


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--keep", type=Path, help="a new directory to work in; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = bench(args.keep or Path(temporary), args.gib)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    mib = 2**20
    print(f"{result['bytes'] / mib:,.0f} MiB, largest layer {result['largest_layer'] / mib:,.0f} MiB")
    for row in result["runs"]:
        before, peak, grown, rate = (row[key] / mib for key in ("before", "peak", "grown", "rate"))
        print(
            f"{row['run']:22} peak {peak:6,.0f} MiB, {grown:6,.0f} above the {before:,.0f} of the imports: ",
            end="",
        )
        print(f"{row['layers']:.2f} x the largest layer; {rate:,.0f} MiB/s")
        if "programs" in row:
            rest = (row["grown"] - row["programs"] - row["activations"]) / result["largest_layer"]
            programs, states = row["programs"] / mib, row["activations"] / mib
            print(
                f"  of these programs {programs:,.0f}, activations {states:,.0f}, the rest {rest:.2f} layers"
            )


if __name__ == "__main__":
    main()
