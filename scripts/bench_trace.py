"""What tracing takes: seconds from the shell and peak memory, each in a process of its own.

    python scripts/bench_trace.py                      # DeepSeek-R1 by jaxpr, StableHLO, compiled for CPU;
    big HLO python scripts/bench_trace.py --target v5p:8x8x6   # and compiled for 384 TPU chips

The big HLO is a text of a million instructions, made here: computations of 1,000 instructions in the
compiler's notation, among them products and collectives, called by the program one by one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

R1 = ["-m", "cmx_jax.cli", "trace", "deepseek-r1", "--json"]
READ = (
    "import sys, pathlib; from cmx_jax.mesh.trace import read_hlo; "
    "p = read_hlo(pathlib.Path(sys.argv[1]).read_text(), (('a', 4), ('b', 8))); "
    "print(len(p.collectives), p.flops)"
)
SIZE = 1000
ARRAY = "f32[128,256]{1,0}"


def computation(number: int) -> str:
    """A chain of `SIZE` instructions."""
    lines = [
        f"%c{number} (p.{number}: f32[128,256]) -> f32[128,256] {{",
        f"  %p.{number} = {ARRAY} parameter(0)",
    ]
    last = f"p.{number}"
    for i in range(SIZE - 1):
        name, meta = f"v.{number}.{i}", f'metadata={{op_name="jit(f)/Layer{number}/op{i}" source_line={i}}}'
        if i % 100 == 50:
            made = f"all-reduce(%{last}), channel_id={i + 1}, replica_groups=[4,8]<=[32], "
            made += "use_global_device_ids=true, to_apply=%add, "
        elif i % 100 == 51:
            made = f"dot(%{last}, %{last}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}, "
        else:
            made = f"add(%{last}, %{last}), "
        shape = "f32[128,128]{1,0}" if i % 100 == 51 else ARRAY
        last = last if i % 100 == 51 else name  # a product of another shape, which nothing reads
        root = "ROOT " if i == SIZE - 2 else ""
        lines.append(f"  {root}%{name} = {shape} {made}{meta}")
    return "\n".join([*lines, "}"])


def write_hlo(path: Path, instructions: int) -> None:
    """A module of that many."""
    count = instructions // SIZE
    add = "%add (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  %y = f32[] parameter(1)\n"
    with path.open("w") as file:
        file.write("HloModule big, is_scheduled=true, num_partitions=32\n\n")
        file.write(f"{add}  ROOT %sum = f32[] add(%x, %y)\n}}\n\n")
        for number in range(count):
            file.write(computation(number) + "\n\n")
        file.write(f"ENTRY %main (a: f32[128,256]) -> f32[128,256] {{\n  %call.0 = {ARRAY} parameter(0)\n")
        for number in range(count):
            root = "ROOT " if number == count - 1 else ""
            file.write(f"  {root}%call.{number + 1} = {ARRAY} call(%call.{number}), to_apply=%c{number}\n")
        file.write("}\n")


def run(name: str, command: list[str]) -> dict[str, object]:
    """One process: seconds, and the largest resident set."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    row = {"run": name, "seconds": time.perf_counter() - began, "peak_mib": usage.ru_maxrss / 1024}
    if child.returncode:
        row["error"] = said.strip().splitlines()[-1]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", help="also compile for a TPU topology")
    parser.add_argument("--instructions", type=int, default=1_000_000, help="of the big HLO")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # it is the compiling that is timed
    with tempfile.TemporaryDirectory() as folder:
        big = Path(folder) / "big.hlo.txt"
        write_hlo(big, args.instructions)
        size = f"{args.instructions:,} instructions, {big.stat().st_size / 2**20:,.0f} MiB"
        runs = {
            "R1, jaxpr": R1,
            "R1, stablehlo": [*R1, "--source", "stablehlo"],
            f"HLO of {size}": ["-c", READ, str(big)],
        }
        runs["R1, hlo for cpu"] = [*R1, "--source", "hlo"]
        if args.target:
            runs[f"R1, hlo for {args.target}"] = [*R1, "--source", "hlo", "--target", args.target]
        rows = []
        for name, command in runs.items():
            rows.append(run(name, command))
            if not args.json:
                print(
                    "{run}: {seconds:.1f} s, {peak_mib:,.0f} MiB".format(**rows[-1]),
                    rows[-1].get("error", ""),
                )
    if args.json:
        print(json.dumps(rows, indent=1))
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
