"""The operator-level figures that fitted constants are held to, and what the model makes of them.

All of the paper's sections 7.4 and 7.5 (Tables 7 to 10), for Ascend 910C dies and for H800; and, as the
paper has neither products of an H800 nor attention over its prompts, DeepGEMM's and FlashAttention-3's.
"""

from typing import Any

from cmx_jax.analysis.cost.constants import Machine, machine
from cmx_jax.analysis.cost.operators import attention, exchange, matmul_us

GROUPS = (8, 16, 32, 64, 128, 256)
EXCHANGES = {  # us, of 128 tokens a rank, by group size (Table 7)
    ("cloudmatrix384", "dispatch"): (116, 131, 133, 141, 152, 152),
    ("cloudmatrix384", "combine"): (118, 132, 146, 150, 150, 149),
    ("h800", "dispatch"): (163, 173, 182, 186, 192, 194),
    ("h800", "combine"): (318, 329, 350, 353, 369, 360),
}
COPIES = {"cloudmatrix384": {"dispatch": 9, "combine": 8}, "h800": {"dispatch": 8, "combine": 8}}
"""Messages of a token: the payload behind Table 7's GB/s has 9 for CANN's dispatch, with the shared
expert's."""
MATMULS = (  # groups, M, N, K, INT8 utilisation in % (Table 10)
    (4, 7168, 4096, 4096, 79.4),
    (4, 2048, 7168, 4096, 77.4),
    (4, 7168, 4096, 8192, 82.7),
    (4, 2048, 7168, 8192, 81.1),
    (8, 7168, 4096, 4096, 79.6),
    (8, 2048, 7168, 4096, 77.9),
)
FP8_MATMULS = (  # M, N, K, TFLOPS: DeepGEMM's first table, for H800
    (4096, 2112, 7168, 1058),
    (4096, 24576, 1536, 990),
    (4096, 32768, 512, 590),
    (4096, 7168, 16384, 1358),
    (4096, 4096, 7168, 1304),
    (4096, 7168, 2048, 1025),
)
MLA = (  # TFLOPS where products bound it, GB/s where memory does (Tables 8 and 9)
    ("cloudmatrix384", "CANN MLA", 246.0, 1346.0),
    ("h800", "FlashMLA", 660.0, 3000.0),
)
CAUSAL = 579
"""TFLOPS of causal attention on an H100 SXM, heads of 128, 4,096 tokens (FlashAttention-3, arXiv 2407.08608,
figure 5)."""
WIDTH = 7168


def exchange_us(on: Machine, which: Any, ranks: int) -> float:
    """Dispatch or combine of Table 7's 128 tokens a rank."""
    size = WIDTH + on["dispatch_bytes"] if which == "dispatch" else 2 * WIDTH
    return exchange(on, which, 128 * COPIES[on.name][which], size, ranks).us


def utilisation(on: Machine, groups: int, m: int, n: int, k: int) -> float:
    """Of the INT8 peak, in %, in Table 10's grouped products."""
    return 2 * groups * m * n * k / matmul_us(on, "int8", (groups, m, k, n)) / on["int8_tops"] / 1e4


def operator_rows() -> list[dict[str, Any]]:
    """Every such figure beside the model's: `table`, `row`, `unit`, `published`, `predicted`, `error`,
    `role`."""
    rows = []
    for (name, which), times in EXCHANGES.items():
        for ranks, us in zip(GROUPS, times, strict=True):
            found = exchange_us(machine(name), which, ranks)
            rows.append(row("7", f"{name} {which} EP{ranks}", "us", us, found))
    die, gpu = machine("cloudmatrix384"), machine("h800")
    for groups, m, n, k, percent in MATMULS:
        found = utilisation(die, groups, m, n, k)
        rows.append(row("10", f"INT8 {groups} x {m} x {n} x {k}", "% of peak", percent, found))
    for m, n, k, fp8 in FP8_MATMULS:
        found = utilisation(gpu, 1, m, n, k) / 100 * gpu["int8_tops"]
        rows.append(row("DeepGEMM", f"FP8 {m} x {n} x {k}", "TFLOPS", fp8, found))
    much = 1e12
    for name, kernel, tflops, gb_s in MLA:
        on = machine(name)
        start = on["matmul_launch_us"]
        rows.append(row("8", kernel, "TFLOPS", tflops, much / (attention(on, much, 0).us - start) / 1e6))
        rows.append(row("9", kernel, "GB/s", gb_s, much / (attention(on, 0, much).us - start) / 1e3))
    h100 = machine("h100")
    found = much / (attention(h100, much, 0, kernel="prefill_tflops").us - h100["matmul_launch_us"]) / 1e6
    rows.append(row("FA3", "causal, 4,096 tokens", "TFLOPS", CAUSAL, found))
    return rows


def row(
    table: str,
    name: str,
    unit: str,
    published: float,
    predicted: float,
    role: str = "calibrated",
    **more: Any,
) -> dict[str, Any]:
    """A published figure beside the model's; `error` is relative, positive where the model's is larger."""
    found = {"table": table, "row": name, "unit": unit, "published": published, "predicted": predicted}
    return {**found, "error": predicted / published - 1, "role": role, "group": "operators", **more}
