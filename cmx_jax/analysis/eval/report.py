"""The result of `evaluate` as text: what was run, a table, and what was not run."""

from typing import Any

NOT_RUN = {
    "skills": "the generated skills (--suite skills)",
    "text": "held-out text (--suite text)",
    "lm_eval": "public benchmarks (--suite lm-eval:TASK)",
}


def render(result: dict[str, Any]) -> str:
    """What `cmx eval` prints."""
    lines = [f"suite    {result['suite']}", f"model    {_model(result['model'])}"]
    if result["against"]:
        lines.append(f"against  {_model(result['against'])}")
    for name, part in (("skills", _skills), ("text", _text), ("lm_eval", _harness)):
        if name in result:
            lines += ["", *part(result[name])]
    lines += ["", *(f"not run: {NOT_RUN[name]}" for name in result["not_run"])]
    return "\n".join(lines).rstrip()


def _model(m: dict[str, Any]) -> str:
    total = sum(m["stored"].values())
    shares = {
        scheme: f"{n / total:.0%}" if n / total >= 0.005 else "<1%" for scheme, n in m["stored"].items()
    }
    stored = ", ".join(f"{scheme} {share}" for scheme, share in shares.items())
    ranks, travel = f"{m['ranks']} ranks ({m['runner']})", f"{m['exchange']} exchange, wire {m['wire']}"
    where = f"{ranks}, {m['slots']} expert slots, {travel}"
    return f"{m['name']}: stored as {stored}; computed in {m['dtype']} on {where}"


def _percent(e: dict[str, float], signed: bool = False) -> str:
    """`value [low, high]` in per cent (points)."""
    value, low, high = (f"{100 * e[name]:{'+' if signed else ''}.1f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _nats(e: dict[str, float | None], form: str = ".4f") -> str:
    interval = "" if e["low"] is None else f" [{e['low']:{form}}, {e['high']:{form}}]"
    return f"{e['value']:{form}}{interval}"


def _skills(s: dict[str, Any]) -> list[str]:
    """A line a skill; columns of the second model only if there is one."""
    both, chance = "difference" in s["mean"], [row["chance"] for row in s["by_skill"]]
    head = ["skill", "chance %", "right % [95 %]"]
    head += ["against % [95 %]", "points [95 %]", "r>w", "w>r", "p", ""] if both else []
    table = [head]
    for row in (*s["by_skill"], {"skill": "mean", "chance": sum(chance) / len(chance)} | s["mean"]):
        cells = [row["skill"], f"{100 * row['chance']:.1f}", _percent(row["accuracy"])]
        if both:
            cells += [_percent(row["accuracy_against"]), _percent(row["difference"], signed=True)]
            cells += [str(row["right_to_wrong"]), str(row["wrong_to_right"]), f"{row['p_value']:.3f}"]
            cells += ["falls" if row["falls"] else ""]
        table.append(cells)
    lines = [
        f"skills   seed {s['seed']}: {len(s['by_skill'])} skills of {s['items_per_skill']} items, "
        f"{s['tokens']:,} tokens a model",
        *_aligned(table),
    ]
    return lines + _verdict(s) if both else lines


def _verdict(s: dict[str, Any]) -> list[str]:
    fallen = [row["skill"] for row in s["by_skill"] if row["falls"]]
    verdict = "falls by more than its interval" if s["mean"]["falls"] else "does not fall beyond its interval"
    expected = 0.025 * len(s["by_skill"])
    return [
        "r>w, w>r: items that turned wrong, right; p: McNemar, exact; intervals: Wilson, Newcombe",
        f"the mean {verdict}; skills that do: {', '.join(fallen) or 'none'} "
        f"(by chance alone one would expect at most {expected:.1f})",
    ]


def _text(t: dict[str, Any]) -> list[str]:
    tokens = f"{t['tokens_predicted']:,} tokens predicted in {t['windows']} windows of {t['window']}"
    lines = [f"text     {t['text']}: {tokens}"]
    lines.append(f"perplexity      {t['model']['perplexity']:.3f}, loss {_nats(t['model']['loss'])} nats")
    if "against" in t:
        a = t["against"]
        rises = "rises beyond its interval" if a["loss_rises"] else "does not rise beyond its interval"
        lines += [
            f"against         {a['perplexity']:.3f}, loss {_nats(a['loss'])} nats",
            f"difference      {_nats(a['loss_rise'], '+.5f')} nats: the loss {rises}",
            f"KL divergence   {_nats(a['kl_divergence'], '.3g')} nats a token, of the second from the first",
            f"top-1 agreement {a['top1_agreement']:.2%}",
        ]
    return lines


def _harness(h: dict[str, Any]) -> list[str]:
    """The harness's numbers as they are."""
    table = [["task", "metric", "model", "against"] if h["against"] else ["task", "metric", "model"]]
    for task, metrics in h["model"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                others = [f"{h['against'][task][metric]:.4f}"] if h["against"] else []
                table.append([task, metric, f"{value:.4f}", *others])
    head = f"lm-eval  {h['version']}: at most the first {h['limit']} documents of each task"
    return [head, *_aligned(table)]


def _aligned(table: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
