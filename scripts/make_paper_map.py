"""Writes docs/paper-map.md: the files that implement or use each section, table and figure of the paper.

Files are found by their own words: "section 4.2.1", "table 7", "figure 24".

python scripts/make_paper_map.py [--check]
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "paper-map.md"
SUBJECTS = {
    "section 2": "peer-to-peer serving architecture: prefill, decode and caching pools; EP320, EPLB",
    "section 3.1": "hardware: Ascend 910C, node, supernode, UB, RDMA and VPC planes",
    "section 3.3": "the chip, the node, the switches",
    "section 4.2.1": "large-scale expert parallelism: FusedDispatch and FusedCombine",
    "section 4.2.2": "MLA operators: MLAProlog, FusedAttention",
    "section 4.2.3": "microbatch pipeline of decode",
    "section 4.2.4": "multi-token prediction, sampling in the graph",
    "section 4.3.1": "staged hybrid parallelism of prefill (SP-TP-SP)",
    "section 4.3.2": "microbatch pipeline of prefill",
    "section 4.3.3": "transfer from prefill to decode, and its mapping of ranks",
    "section 4.4": "EMS: caching over the UB network",
    "section 4.4.1": "memory pool: DRAM over disk, consistent hashing",
    "section 4.4.2": "context caching: blocks of prompts",
    "section 4.4.3": "model caching and switching",
    "section 4.5": "INT8 quantization",
    "table 1": "bandwidth and latency of UB",
    "table 2": "model loading and switching",
    "table 3": "prefill throughput",
    "table 4": "decode throughput",
    "table 5": "decode under objectives of 50, 30 and 15 ms",
    "table 7": "dispatch and combine against other systems",
    "table 8": "MLA operators, compute",
    "table 9": "MLA operators, memory",
    "table 10": "matrix products",
    "table 11": "resource allocation, switches",
    "figure 24": "allocation rate against the size of a supernode",
}
HEAD = """# Paper map

Where each part of *Serving Large Language Models on Huawei CloudMatrix384* (arXiv 2506.12708) is in the code.
Made by `scripts/make_paper_map.py` from the references in the files.

| part | subject | files (below `cmx_jax/`) |
|---|---|---|
"""


def references() -> dict[str, list[str]]:
    """Returns the files that mention each part of the paper."""
    files: dict[str, set[str]] = {}
    for path in sorted((ROOT / "cmx_jax").rglob("*.py")):
        name = str(path.relative_to(ROOT / "cmx_jax"))
        for kind, numbers in re.findall(
            r"\b(section|table|figure)s?\s+((?:\d[\d.]*)(?:(?:, | and )\d[\d.]*)*)", path.read_text(), re.I
        ):
            for number in re.findall(r"\d+(?:\.\d+)*", numbers):
                files.setdefault(f"{kind.lower()} {number}", set()).add(name)
    return {part: sorted(names) for part, names in files.items()}


def text() -> str:
    found = references()
    rows = [
        f"| {part.capitalize()} | {subject} | {', '.join(f'`{name}`' for name in found[part])} |"
        for part, subject in SUBJECTS.items()
        if part in found
    ]
    return HEAD + "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit code 1 if the page is out of date")
    args = parser.parse_args()
    if args.check:
        return int(OUT.read_text() != text())
    OUT.write_text(text())
    print(OUT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
