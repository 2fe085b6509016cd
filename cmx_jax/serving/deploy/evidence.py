"""Numbers that show that each mechanism of a deployment ran."""

from dataclasses import asdict, dataclass
from typing import Any

from cmx_jax.mesh.runners import Devices
from cmx_jax.serving.deploy.recipe import Recipe
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.instance import Instance


@dataclass(frozen=True)
class Evidence:
    """Numbers that show that a mechanism of the paper ran.

    Attributes:
      mechanism: Name of the mechanism, as in `cmx_jax.serving.deploy.recipe.MECHANISMS`; or `pools`
        (instances), `exchange` (without INT8), `transfer` (pages from prefill to decode), `peers` (prefill
        beside decode), `planes` (bytes by network).
      text: The numbers in one line.
      figures: The numbers, for JSON.
    """

    mechanism: str
    text: str
    figures: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PlaneBytes:
    """Bytes that moved on each network plane of the supernode (section 3.1.3), since the counters' start.

    Attributes:
      ub: Payload of dispatch and combine, and blocks to and from the caching pool.
      rdma: KV pages from prefill to decode.
      vpc: Blocks given to the caching pool, which writes them to disk.
    """

    ub: int
    rdma: int
    vpc: int


def plane_bytes(engine: Engine) -> PlaneBytes:
    """Returns the bytes that an engine moved, by plane."""
    context = engine.mover.context
    exchanged = sum(sum(i.payload_bytes()) for i in engine.instances)
    cached = context.fetched_bytes + context.stored_bytes if context else 0
    return PlaneBytes(
        ub=exchanged + cached,
        rdma=engine.mover.moved_bytes,
        vpc=context.stored_bytes if context else 0,
    )


def evidence(engine: Engine, recipe: Recipe) -> list[Evidence]:
    """Returns the evidence of each mechanism of a recipe; those that are switched off are left out."""
    args, decode = recipe.engine, engine.decode
    found = [_instances(engine)]
    if decode.config.int8:
        found.append(_int8(decode))
    found.append(_exchange(engine, args.wire or decode.programs.dtype))
    if args.mailbox_rows == 0:
        found.append(_mailboxes(engine))
    if args.ranks_per_npu > 1:
        runner = decode.programs.runner
        devices = runner.mesh.size if isinstance(runner, Devices) else 1
        figures = {"ranks": decode.layout.ranks, "devices": devices}
        text = f"decode runs {decode.layout.ranks} dies as lanes of {devices} device(s)"
        found.append(Evidence("dies", text, figures))
    if args.microbatches > 1 or recipe.prefill_microbatches > 1:
        figures = {"decode": args.microbatches, "prefill": recipe.prefill_microbatches}
        text = f"{figures['decode']} streams in a decode step, {figures['prefill']} in a prefill step"
        found.append(Evidence("microbatches", text, figures))
    if decode.programs.num_speculative_tokens:
        found.append(_mtp(engine))
    if args.redundant_slots or args.shared_slots:
        found.append(_replicas(decode))
    if args.eplb_interval or recipe.prefill_eplb_interval:
        found.append(_eplb(engine))
    if recipe.share_sequences:
        found.append(_sequences(engine))
    if engine.mover.context is not None:
        found.append(_caching(engine))
    return [*found, _transfer(engine), _overlap(engine), _planes(engine)]


def _instances(engine: Engine) -> Evidence:
    npus = {i.name: i.layout.ranks // i.layout.ranks_per_npu for i in engine.instances}
    text = f"{len(npus)} instances hold weights on {sum(npus.values())} NPUs"
    return Evidence("pools", text, {"instances": len(npus), "npus": sum(npus.values())})


def _int8(decode: Instance) -> Evidence:
    fields = sorted(f"{stack}.{path}" for stack, path in decode.config.int8)
    return Evidence("int8", f"{len(fields)} kinds of matrices are INT8, products too", {"fields": fields})


def _exchange(engine: Engine, wire: str) -> Evidence:
    sent = [i.payload_bytes() for i in engine.instances]
    dispatched, combined = (sum(column) for column in zip(*sent, strict=True))
    figures = {"wire": wire, "dispatched": dispatched, "combined": combined}
    text = f"{dispatched:,} bytes dispatched in {wire}, {combined:,} combined"
    return Evidence("int8-wire" if wire == "int8" else "exchange", text, figures)


def _mailboxes(engine: Engine) -> Evidence:
    busiest = max(engine.instances, key=lambda i: i.traffic.most_rounds)
    figures = {"most_rounds": busiest.traffic.most_rounds, "streams": busiest.layout.microbatches}
    text = f"at most {figures['most_rounds']} rounds of dispatch a layer, in {figures['streams']} stream(s)"
    return Evidence("static-mailboxes", text, figures)


def _mtp(engine: Engine) -> Evidence:
    proposed = sum(int(i.traffic.proposed.sum()) for i in engine.decoders)
    accepted = sum(int(i.traffic.accepted.sum()) for i in engine.decoders)
    text = f"{accepted} of {proposed} drafts accepted"
    return Evidence("mtp", text, {"proposed": proposed, "accepted": accepted})


def _replicas(decode: Instance) -> Evidence:
    layout, experts = decode.layout, decode.config.n_routed_experts
    figures = {"experts": experts, "redundant": layout.redundant_slots, "shared": layout.shared_slots}
    text = (
        f"{experts} experts, {layout.redundant_slots} redundant and {layout.shared_slots} shared slots on "
        f"{layout.ranks} ranks, {layout.slots_per_rank} on each"
    )
    return Evidence("replicas", text, figures)


def _eplb(engine: Engine) -> Evidence:
    figures: dict[str, Any] = {}
    texts = []
    for role, moves in (("decode", engine.moves), ("prefill", engine.prefills.moves)):
        figures[role] = [asdict(move) for move in moves]
        if moves:
            moved, slots = sum(m.moved for m in moves), sum(m.slots for m in moves)
            before = sum(m.before for m in moves) / len(moves)
            after = sum(m.after for m in moves) / len(moves)
            texts.append(
                f"{role}: {moved} of {slots} slots moved in {len(moves)} rebalancings, balancedness "
                f"{before:.2f} to {after:.2f}"
            )
    return Evidence("eplb", "; ".join(texts) or "no rebalancing was due", figures)


def _sequences(engine: Engine) -> Evidence:
    layout = engine.prefill[0].layout
    steps = sum(i.traffic.steps for i in engine.prefill)
    tokens = sum(i.computed_tokens for i in engine.prefill)
    text = f"{layout.sequence_ranks} ranks shared each of {steps} prefill steps, {tokens} tokens in all"
    return Evidence("sp-tp-sp", text, {"ranks": layout.sequence_ranks, "steps": steps, "tokens": tokens})


def _caching(engine: Engine) -> Evidence:
    context = engine.mover.context
    assert context is not None
    figures = {"queries": context.queries, "hits": context.hits, "block": context.block}
    text = f"{context.hits} of {context.queries} tokens looked up came from blocks of {context.block} tokens"
    return Evidence("caching", text, figures)


def _transfer(engine: Engine) -> Evidence:
    sent = {i.name: dict(sorted(i.traffic.sent.items())) for i in engine.prefill if i.traffic.sent}
    prompts = sum(sum(by_rank.values()) for by_rank in sent.values())
    ranks = sum(map(len, sent.values()))
    text = f"{prompts} prompts moved from prefill to decode, sent by {ranks} ranks of {len(sent)} instances"
    return Evidence("transfer", text, {"prompts": prompts, "by_rank": sent})


def _overlap(engine: Engine) -> Evidence:
    figures = {"decode_steps": engine.steps, "overlapped": engine.overlapped_steps}
    text = f"prefill was running during {engine.overlapped_steps} of {engine.steps} decode steps"
    return Evidence("peers", text, figures)


def _planes(engine: Engine) -> Evidence:
    moved = plane_bytes(engine)
    text = f"UB {moved.ub:,} bytes, RDMA {moved.rdma:,}, VPC {moved.vpc:,}"
    return Evidence("planes", text, asdict(moved))
