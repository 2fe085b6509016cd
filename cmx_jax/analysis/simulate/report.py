"""What a simulation says, under the names of vLLM's `benchmark_serving` where it has them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cmx_jax.analysis.simulate.supernodes import Outcome
from cmx_jax.errors import CmxError

PERCENTILES = (50, 90, 99)


def summary(
    outcome: Outcome, slo_ttft_ms: float | None = None, slo_tpot_ms: float | None = None
) -> dict[str, Any]:
    """The document that `cmx simulate --json` prints.

    `ttft`: time to first token, from arrival; `queue`: until its first chunk begins to run; `tpot`: mean time
    of each further token, of requests that have any; `e2el`: until the last token. `request_goodput` counts
    the requests a second that meet both objectives. Utilisation is the share of the time in which an
    instance ran a step.

    Raises:
      CmxError: an objective that is not above zero.
    """
    for name, slo in (("slo_ttft_ms", slo_ttft_ms), ("slo_tpot_ms", slo_tpot_ms)):
        if slo is not None and not 0 < slo < math.inf:
            raise CmxError(f"{name} is {slo:g}, expected above zero")
    c, d = outcome.columns, outcome.deployment
    duration = float(c["finished"].max() - c["arrived"].min())
    ttft, later = c["first_token"] - c["arrived"], np.maximum(c["output"] - 1, 1)
    tpot = (c["finished"] - c["first_token"]) / later
    inputs, outputs, cached = (int(c[name].sum()) for name in ("prompt", "output", "cached"))
    span = max(duration, 1e-12)
    npus = d.npus * len(outcome.nodes)
    found: dict[str, Any] = {
        "completed": len(ttft),
        "duration": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(ttft) / span,
        "output_throughput": outputs / span,
        "total_token_throughput": (inputs + outputs) / span,
        "supernodes": len(outcome.nodes),
        "npus": npus,
        "output_throughput_per_npu": outputs / span / npus,
        "total_token_throughput_per_npu": (inputs + outputs) / span / npus,
        "prefix_hit_rate": cached / inputs,
    }
    found |= spread("queue", c["started"] - c["arrived"])
    found |= spread("ttft", ttft)
    found |= spread("tpot", tpot[c["output"] > 1])
    found |= spread("e2el", c["finished"] - c["arrived"])
    if slo_ttft_ms is not None or slo_tpot_ms is not None:
        good = (ttft * 1e3 <= (slo_ttft_ms or math.inf)) & (tpot * 1e3 <= (slo_tpot_ms or math.inf))
        found |= {"slo_ttft_ms": slo_ttft_ms, "slo_tpot_ms": slo_tpot_ms}
        found |= {"request_goodput": float(good.sum()) / span, "slo_attainment": float(good.mean())}
    prefill = [i for node in outcome.nodes for i in node.scheduler.prefill]
    decode = [i for node in outcome.nodes for i in node.scheduler.decoders]
    found["prefill_utilization"] = float(np.mean([i.busy for i in prefill])) / span
    found["decode_utilization"] = float(np.mean([i.busy for i in decode])) / span
    found["mean_decode_batch"] = float(np.mean([i.row_seconds for i in decode])) / span
    return found


def spread(name: str, seconds: np.ndarray, percentiles: Sequence[float] = PERCENTILES) -> dict[str, float]:
    """Mean, median, deviation and percentiles of samples, in milliseconds; zeros if there are none."""
    ms = seconds * 1e3 if len(seconds) else np.zeros(1)
    found = {f"mean_{name}_ms": float(ms.mean()), f"median_{name}_ms": float(np.median(ms))}
    found[f"std_{name}_ms"] = float(ms.std())
    return found | {f"p{p:g}_{name}_ms": float(np.percentile(ms, p)) for p in percentiles}


def render(result: dict[str, Any]) -> str:
    """The report for a terminal."""
    r = result
    lines = [
        f"{r['completed']:,} requests in {r['duration']:,.1f} s on {r['npus']:,} NPUs of {r['supernodes']} "
        f"supernode(s): {r['total_input_tokens']:,} tokens in, {r['total_output_tokens']:,} out",
        f"{r['request_throughput']:,.2f} requests/s, {r['output_throughput']:,.1f} output tokens/s "
        f"({r['output_throughput_per_npu']:,.1f} an NPU), {r['total_token_throughput']:,.1f} in all",
        f"{'ms':<24}{'mean':>12}" + "".join(f"{f'p{p}':>12}" for p in PERCENTILES),
    ]
    names = {
        "queue": "waiting",
        "ttft": "time to first token",
        "tpot": "time per output token",
        "e2el": "whole",
    }
    for name, title in names.items():
        numbers = [r[f"{of}_{name}_ms"] for of in ("mean", *(f"p{p}" for p in PERCENTILES))]
        lines.append(f"{title:<24}" + "".join(f"{number:>12,.1f}" for number in numbers))
    if "request_goodput" in r:
        slos = [f"{r[f'slo_{n}_ms']:g} ms {n.upper()}" for n in ("ttft", "tpot") if r[f"slo_{n}_ms"]]
        met = f"{r['slo_attainment']:.1%} within {' and '.join(slos)}"
        lines.append(f"goodput {r['request_goodput']:,.2f} requests/s: {met}")
    lines.append(
        f"busy: prefill {r['prefill_utilization']:.1%}, decode {r['decode_utilization']:.1%} with "
        f"{r['mean_decode_batch']:,.1f} sequences an instance; from the prefix cache: "
        f"{r['prefix_hit_rate']:.1%} of prompt tokens"
    )
    return "\n".join(lines)
