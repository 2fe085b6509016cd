"""The result of `evaluate` as text: the models, a table for each part, and the parts that were not run."""

from cmx_jax.analysis.eval.results import (
    Evaluation,
    HarnessResult,
    ModelDescription,
    Score,
    SkillsResult,
    TextResult,
)
from cmx_jax.analysis.eval.statistics import Estimate

NOT_RUN = {
    "skills": "the generated skills (--suite skills)",
    "text": "held-out text (--suite text)",
    "lm_eval": "public benchmarks (--suite lm-eval:TASK)",
}


def render(result: Evaluation) -> str:
    """Formats a result for a terminal."""
    lines = [f"suite    {result.suite}", f"model    {_model(result.model)}"]
    if result.against:
        lines.append(f"against  {_model(result.against)}")
    if result.skills:
        lines += ["", *_skills(result.skills)]
    if result.text:
        lines += ["", *_text(result.text)]
    if result.lm_eval:
        lines += ["", *_harness(result.lm_eval)]
    lines += ["", *(f"not run: {NOT_RUN[name]}" for name in result.not_run)]
    return "\n".join(lines).rstrip()


def _model(m: ModelDescription) -> str:
    total = sum(m.stored.values())
    shares = {scheme: f"{n / total:.0%}" if n / total >= 0.005 else "<1%" for scheme, n in m.stored.items()}
    stored = ", ".join(f"{scheme} {share}" for scheme, share in shares.items())
    layout = f"{m.ranks} ranks ({m.runner}), {m.slots} expert slots"
    exchange = f"{m.exchange} exchange, wire {m.wire}"
    return f"{m.name}: stored as {stored}; computed in {m.dtype} on {layout}, {exchange}"


def _percent(e: Estimate, signed: bool = False) -> str:
    """Formats an estimate as `value [low, high]` in per cent (points)."""
    value, low, high = (f"{100 * number:{'+' if signed else ''}.1f}" for number in (e.value, e.low, e.high))
    return f"{value} [{low}, {high}]"


def _nats(e: Estimate, form: str = ".4f") -> str:
    interval = "" if e.low == float("-inf") else f" [{e.low:{form}}, {e.high:{form}}]"
    return f"{e.value:{form}}{interval}"


def _skills(s: SkillsResult) -> list[str]:
    """A row for each skill and their mean; with columns for a second model if there is one."""
    head = ["skill", "chance %", "right % [95 %]"]
    head += ["against % [95 %]", "points [95 %]", "r>w", "w>r", "p", ""] if s.mean.change else []
    table = [head, *(_skill(row.skill, row.chance, row.score) for row in s.by_skill)]
    table.append(_skill("mean", sum(row.chance for row in s.by_skill) / len(s.by_skill), s.mean))
    lines = [
        f"skills   seed {s.seed}: {len(s.by_skill)} skills of {s.items_per_skill} items, "
        f"{s.tokens:,} tokens a model",
        *_aligned(table),
    ]
    return lines + _verdict(s, s.mean.change.falls) if s.mean.change else lines


def _skill(name: str, chance: float, score: Score) -> list[str]:
    """Cells of a row."""
    cells, change = [name, f"{100 * chance:.1f}", _percent(score.accuracy)], score.change
    if change:
        cells += [_percent(change.accuracy_against), _percent(change.difference, signed=True)]
        cells += [str(change.right_to_wrong), str(change.wrong_to_right), f"{change.p_value:.3f}"]
        cells += ["falls" if change.falls else ""]
    return cells


def _verdict(s: SkillsResult, mean_falls: bool) -> list[str]:
    fallen = [row.skill for row in s.by_skill if row.score.change and row.score.change.falls]
    verdict = "falls by more than its interval" if mean_falls else "does not fall beyond its interval"
    expected = 0.025 * len(s.by_skill)
    return [
        "r>w, w>r: items that turned wrong, right; p: McNemar, exact; intervals: Wilson, Newcombe",
        f"the mean {verdict}; skills that do: {', '.join(fallen) or 'none'} "
        f"(by chance alone one would expect at most {expected:.1f})",
    ]


def _text(t: TextResult) -> list[str]:
    tokens = f"{t.tokens_predicted:,} tokens predicted in {t.windows} windows of {t.window}"
    lines = [f"text     {t.text}: {tokens}"]
    lines.append(f"perplexity      {t.model.perplexity:.3f}, loss {_nats(t.model.loss)} nats")
    if t.against:
        a = t.against
        rises = "rises beyond its interval" if a.loss_rises else "does not rise beyond its interval"
        lines += [
            f"against         {a.perplexity:.3f}, loss {_nats(a.loss)} nats",
            f"difference      {_nats(a.loss_rise, '+.5f')} nats: the loss {rises}",
            f"KL divergence   {_nats(a.kl_divergence, '.3g')} nats a token, of the second from the first",
            f"top-1 agreement {a.top1_agreement:.2%}",
        ]
    return lines


def _harness(h: HarnessResult) -> list[str]:
    """A row for each task and metric."""
    table = [["task", "metric", "model", "against"] if h.against else ["task", "metric", "model"]]
    for task, metrics in h.model.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                second = [f"{h.against[task][metric]:.4f}"] if h.against else []
                table.append([task, metric, f"{value:.4f}", *second])
    head = f"lm-eval  {h.version}: at most the first {h.limit} documents of each task"
    return [head, *_aligned(table)]


def _aligned(table: list[list[str]]) -> list[str]:
    """Formats rows with columns of equal width, the first to the left and the other ones to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
