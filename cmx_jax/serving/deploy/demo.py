"""The demo: prompts through prefill and decode instances carved out of the 384-device virtual supernode."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import enable_compilation_cache
from cmx_jax.mesh.pools import Pools, carve
from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.serving.deploy.engine_args import POOL_DEFAULTS, POOL_MODEL_LEN, EngineArgs
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.deploy.site import Site
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.stats import Traffic
from cmx_jax.serving.scheduling.request import Request, SamplingParams

PROMPTS = (
    "The with statement",
    "Open a file",
    "A class is",
    "Convert a string",
    "If the object is",
    "The import statement",
)


def run(
    *,
    name_or_path: str = "tiny",
    prompts: tuple[str, ...] = PROMPTS,
    max_tokens: int = 32,
    prefill: int = 6,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    """Serves prompts on a supernode and reports on pools, requests and exchanges.

    The programs of short sequences run once before the clock starts, so that times are of serving.

    Args:
      name_or_path: The model.
      prompts: Texts to continue.
      max_tokens: Number of tokens to generate for each prompt.
      prefill: Number of prefill instances to start.
      progress: Gets a line about what is being done.
      options: Fields of `EngineArgs`; the defaults are those of pools, with one MTP draft.

    Raises:
      CmxError: The model is refused, an option does not fit it, or `prefill` exceeds the supernode.
    """
    enable_compilation_cache()
    args = EngineArgs(**{**POOL_DEFAULTS, "num_speculative_tokens": 1, **options})
    progress("reading the model")
    model = Model.read(name_or_path, args.dtype, args.quant)
    pools = carve(CLOUDMATRIX384)
    if not 1 <= prefill <= len(pools.prefill):
        raise CmxError(f"{prefill} prefill instances asked for, expected 1 to {len(pools.prefill)}")
    progress(f"starting {CLOUDMATRIX384.npus} devices, 1 decode and {prefill} prefill instance(s)")
    context = args.context(model.config.max_position_embeddings, POOL_MODEL_LEN)
    site = Site(model=model, args=args, context=context)
    started = site.instances(replace(pools, prefill=pools.prefill[:prefill]))
    engine = Engine(*started, eplb_interval=args.eplb_interval)
    params = SamplingParams(max_tokens=max_tokens)
    warm = SamplingParams(max_tokens=2)
    for stage, stage_params in (("compiling (kept for the next time)", warm), ("serving", params)):
        progress(stage)
        for instance in (*engine.prefill, engine.decode):
            instance.traffic = Traffic()
        engine.moves.clear()
        requests = [engine.submit(model.encode(p), stage_params) for p in prompts]
        while engine.busy:
            engine.step()
            progress(f"{stage}: {sum(len(r.tokens) for r in requests)} tokens")
    return report(model, pools, engine, requests, prompts)


def report(
    model: Model, pools: Pools, engine: Engine, requests: list[Request], prompts: tuple[str, ...]
) -> dict[str, Any]:
    """The document that `cmx demo --json` prints."""
    tokens = sum(len(r.tokens) for r in requests)
    seconds = max(r.finished or 0 for r in requests) - min(r.arrived for r in requests)
    return {
        "model": str(model.directory.name),
        "supernode": pools.supernode.name,
        "devices": pools.supernode.npus,
        "pools": pools.as_dict(),
        "started": [i.name for i in (*engine.prefill, engine.decode)],
        "requests": [
            {
                "prompt": prompt,
                "text": model.decode(r.tokens),
                "prompt_tokens": len(r.prompt),
                "output_tokens": len(r.tokens),
                "finish_reason": r.finish_reason,
                "ttft_s": round(r.ttft_s, 4),
                "tpot_s": round(r.tpot_s, 4),
            }
            for prompt, r in zip(prompts, requests, strict=True)
        ],
        "tokens_per_s": round(tokens / seconds, 2),
        "exchange": {i.name: i.exchange_bytes() for i in (*engine.prefill, engine.decode)},
        "rebalanced": [asdict(move) for move in engine.moves],
    }


def render(result: dict[str, Any]) -> str:
    """The report for a terminal."""
    pools, lines = result["pools"], [f"{result['supernode']}: {result['devices']} devices"]
    for role in ("decode", "prefill"):
        for entry in pools[role]:
            running = "model loaded" if entry["name"] in result["started"] else "free"
            first, last = entry["nodes"]
            lines.append(
                f"  {entry['name']:<10} {entry['npus']:>3} NPUs, nodes {first:>2}-{last:<2}  {running}"
            )
    spare = pools["spare"]
    lines.append(
        f"  {'spare':<10} {spare['npus']:>3} NPUs, room for {spare['prefill_instances']} prefill instances"
    )
    for r in result["requests"]:
        lines.append("")
        lines.append(f"> {r['prompt']}")
        lines.append(r["text"].strip("\n"))
        lines.append(
            f"  [{r['prompt_tokens']} + {r['output_tokens']} tokens, first after {r['ttft_s']:.2f} s, "
            f"then {r['tpot_s'] * 1000:.0f} ms a token]"
        )
    lines.append(f"\n{result['tokens_per_s']:.1f} tokens/s over all requests")
    for name, e in result["exchange"].items():
        lines.append(
            f"{name}: {e['dispatch_bytes']:,.0f} bytes dispatched and {e['combine_bytes']:,.0f} combined "
            f"per rank and step, {e['rounds_mean']:.1f} rounds a layer (most {e['rounds_most']})"
        )
        if "acceptance" in e:
            lines.append(
                f"{name}: drafts accepted by position: {', '.join(f'{a:.0%}' for a in e['acceptance'])}"
            )
    for move in result["rebalanced"]:
        lines.append(
            f"experts rebalanced: {move['moved']} of {move['slots']} slots moved, balancedness "
            f"{move['before']:.2f} to {move['after']:.2f}"
        )
    return "\n".join(lines)
