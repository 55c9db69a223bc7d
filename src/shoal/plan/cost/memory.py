"""Memory of one device: model states by what is split, activations by what is recomputed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from shoal.legal import ModelFacts
from shoal.plan.cost.constants import DEFAULT, Constants
from shoal.plan.cost.eager import eager_bytes, loss_bytes
from shoal.plan.cost.pipeline import in_flight
from shoal.plan.software import SHOAL, Software
from shoal.plan.workload import Candidate, Workload, stage_blocks

POLICY_BYTES = {"diloco": 8.0, "streaming-diloco": 12.0}
"""An element: the parameters at the last agreement, the momentum of the outer step (2311.08105),
and what is on its way."""
CODEC_BYTES = {"int4": 4.0, "sign": 4.0, "topk": 4.0, "powersgd": 8.0}
"""An element: the memory of errors, by default; powersgd's warm start. While they sum, codecs hold
four copies more."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at its peak, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    gathers: float
    transient: float
    reserve_share: float = 0.0
    cuda_context: float = 0.0

    @property
    def states(self) -> float:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def live(self) -> float:
        """Peak of live tensors: the larger of the passes and the update."""
        passes = self.states + self.activations + self.logits + self.gathers
        return max(passes, self.update)

    @property
    def update(self) -> float:
        """Live tensors while the optimizer runs: the activations are gone."""
        return self.states + self.transient

    @property
    def reserve(self) -> float:
        """What the allocator holds beyond live tensors: fragments and rounding."""
        return self.reserve_share * self.live

    @property
    def reserved(self) -> float:
        """What the allocator holds at the peak."""
        return self.live + self.reserve

    @property
    def total(self) -> float:
        """What the device must have."""
        return self.reserved + self.cuda_context

    def parts(self) -> dict[str, float]:
        """Every part by name, in bytes."""
        names = [field.name for field in fields(self) if field.name != "reserve_share"]
        named = {name: getattr(self, name) for name in [*names, "reserve"]}
        context = named.pop("cuda_context")
        return {**named, "CUDA context": context}


def activation_bytes(
    facts: ModelFacts,
    *,
    sequence_tokens: int,
    tensor: int = 1,
    recompute: str = "none",
    software: Software,
    experts: bool = False,
    input_bytes: float = 2.0,
) -> float:
    """Bytes that one token leaves in one block for the backward pass, on one device.

    With dropout, no flash attention, sequence parallel and a feed-forward width of four this is
    (34 h + 5 a s) / t, and without sequence parallel 10 h + (24 h + 5 a s) / t (arXiv 2205.05198,
    equations 2 to 4; selective recompute drops 5 a s, full keeps 2 h). `input_bytes` is what an
    element costs that is kept as input of a matrix product (1 in 8 bits).
    """
    hidden_split = tensor if software.sequence_parallel else 1
    if recompute == "full":
        return 2.0 * facts.hidden / hidden_split
    hidden = 4.0 + 2 * input_bytes + (2.0 if software.dropout else 0.0)
    hidden *= facts.hidden / hidden_split
    hidden += software.unsplit_bytes * facts.hidden
    queries = facts.heads * facts.head_size
    values = facts.heads * facts.value_head_size
    groups = facts.key_value_heads * (facts.head_size + facts.value_head_size)
    inner = facts.feed_forward
    if experts:
        inner = facts.experts_per_token * facts.expert_feed_forward + facts.shared_feed_forward
        hidden += 4.0 * facts.experts_per_token * facts.hidden  # copies sent to the experts
    per_inner = (4.0 if software.fused else 6.0) if facts.gated else 2.0
    per_inner += 0.0 if facts.gated and software.recomputes_gate else input_bytes
    split = 2.0 * (queries + groups + values) + per_inner * inner
    if not software.flash and recompute == "none":
        split += (5.0 if software.dropout else 2.0) * facts.heads * sequence_tokens
    return hidden + split / tensor


def stage_parameters(
    facts: ModelFacts,
    *,
    blocks: int,
    candidate: Candidate,
    first: bool,
    last: bool,
    experts: str = "own",
) -> float:
    """Parameters that one device holds of its stage before the shard axis splits them.

    `experts`: those of the device, its `own`, or `all`.
    """
    layout = candidate.layout
    whole = blocks * facts.block_parameters
    if facts.experts and layout.expert > 1 and experts == "own":
        routed = facts.expert_layers * facts.experts * facts.expert_parameters / facts.layers
        whole -= blocks * routed * (1 - 1 / layout.expert)
    if first:
        whole += facts.embedding_parameters
    if last:
        whole += facts.final_parameters + facts.head_parameters
        if facts.tied and not first:
            whole += facts.vocabulary * facts.hidden
    return whole / layout.tensor


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a device stands in the pipeline and how many blocks it has."""

    index: int
    blocks: int
    count: int


def memory_of(
    stage: Stage,
    *,
    workload: Workload,
    candidate: Candidate,
    software: Software,
    constants: Constants,
) -> Memory:
    """Bytes on a device of `stage` at its peak."""
    facts, layout = workload.facts, candidate.layout
    first, last = stage.index == 0, stage.index == stage.count - 1
    parameters = stage_parameters(
        facts, blocks=stage.blocks, candidate=candidate, first=first, last=last
    )
    every = stage_parameters(
        facts, blocks=stage.blocks, candidate=candidate, first=first, last=last, experts="all"
    )
    states = _states(parameters, every, workload=workload, candidate=candidate, software=software)
    tokens = candidate.micro_batch_samples * workload.sequence_tokens / layout.context
    held = in_flight(
        candidate.schedule,
        stages=layout.pipeline,
        stage=stage.index,
        micro_batches=candidate.micro_batches(workload),
        chunks=candidate.chunks,
    )
    block = whole = _per_block(workload, candidate=candidate, software=software, recompute="none")
    if candidate.recompute != "none":
        kept = _per_block(workload, candidate=candidate, software=software, recompute=None)
        block = candidate.recompute_share * kept + (1 - candidate.recompute_share) * whole
    activations = held * stage.blocks * block * tokens
    if software.autocast and workload.precision != "fp32":
        # The backward of a micro batch reads the cast weights: they stay until then, whole even
        # where parameters are sharded. Recompute casts a block's again.
        casts = 2.0 * parameters / (1 if candidate.recompute == "none" else stage.blocks)
        activations += held * casts
    if candidate.recompute != "none":
        # The block being recomputed is whole again for a moment.
        activations += (whole - kept) * tokens
    logits, width = 0.0, 4.0 if workload.precision == "fp32" else 2.0
    if last and software.autocast:
        logits = loss_bytes(
            facts,
            tokens=tokens,
            tensor=layout.tensor,
            width=width,
            on_cpu=software.on_cpu,
        )
    elif last:
        logits = software.logit_bytes * tokens * facts.vocabulary / layout.tensor
    gathers = 0.0
    if candidate.level == "parameters" and layout.shard > 1:
        # The block in use and the one fetched ahead, and one gradient on its way out.
        gathers = 3 * software.weight_bytes * facts.block_parameters / layout.tensor
    if software.keeps_gathers and layout.tensor > 1:
        gathers += 4.0 * tokens * facts.hidden
    return Memory(
        weights=states[0],
        gradients=states[1],
        optimizer=states[2],
        activations=activations,
        logits=logits,
        gathers=gathers,
        transient=states[3] + (gathers if software.keeps_gathers else 0.0),
        reserve_share=constants.reserve_share,
        cuda_context=constants.context_bytes,
    )


def memory_on_cpu(candidate: Candidate, *, workload: Workload) -> Memory:
    """Bytes of the fullest worker of this machine at its peak; live tensors only."""
    blocks = stage_blocks(
        workload.facts,
        stages=candidate.layout.pipeline,
        sequence_tokens=workload.sequence_tokens,
        balanced=True,
    )
    stages = [
        memory_of(
            Stage(index=at, blocks=each, count=len(blocks)),
            workload=workload,
            candidate=candidate,
            software=replace(SHOAL, on_cpu=True),
            constants=replace(DEFAULT, reserve_share=0.0, context_bytes=0.0),
        )
        for at, each in enumerate(blocks)
    ]
    return max(stages, key=lambda memory: memory.live)


def _per_block(
    workload: Workload, *, candidate: Candidate, software: Software, recompute: str | None
) -> float:
    """Activation bytes per token and block, averaged over dense and expert blocks."""
    facts = workload.facts
    share = facts.expert_layers / facts.layers

    def one(experts: bool) -> float:
        if software.autocast:
            return eager_bytes(
                facts,
                rows=candidate.micro_batch_samples,
                sequence_tokens=workload.sequence_tokens,
                tensor=candidate.layout.tensor,
                recompute=recompute or candidate.recompute,
                experts=experts,
                width=4.0 if workload.precision == "fp32" else 2.0,
                on_cpu=software.on_cpu,
            )
        return activation_bytes(
            facts,
            sequence_tokens=workload.sequence_tokens,
            tensor=candidate.layout.tensor,
            recompute=recompute or candidate.recompute,
            software=software,
            experts=experts,
            input_bytes=1.0 if workload.precision in {"fp8", "fp4"} else 2.0,
        )

    if not share:
        return one(False)
    return share * one(True) + (1 - share) * one(False)


def _states(
    parameters: float, every: float, *, workload: Workload, candidate: Candidate, software: Software
) -> tuple[float, float, float, float]:
    """(weights, gradients, optimizer state, transient in the update) in bytes.

    ZeRO's stages (arXiv 1910.02054, section 5): the optimizer state over the shard axis first,
    then gradients, then parameters. `parameters`: of the device's own experts; `every`: of all, of
    which shard leaves as much whether ranks have different experts or parts of the same.
    """
    shard = candidate.state_split
    level = candidate.level if shard > 1 else "optimizer"
    split_gradients = shard if level in {"gradients", "parameters"} else 1
    split_weights = shard if level == "parameters" else 1

    def over(ranks: int) -> float:
        return software.padding_parameters / ranks + (every / ranks if ranks > 1 else parameters)

    weights = software.weight_bytes * over(split_weights)
    master = software.master_bytes
    transient = software.transient_bytes * over(split_gradients)
    if shard > 1 and level == "optimizer":
        transient += software.regather_bytes * (over(1) + over(shard))
    if workload.trainable != "all":
        if workload.base_bytes is not None:  # replicas are whole then
            blocks = workload.facts.layers * workload.facts.block_parameters
            weights -= (software.weight_bytes - workload.base_bytes) * blocks
        return weights, 0.0, 0.0, 0.0
    gradients = software.gradient_bytes * over(split_gradients)
    optimizer = (master + software.moment_bytes) * over(shard)
    kept = POLICY_BYTES.get(candidate.policy, 0.0) + CODEC_BYTES.get(candidate.codec, 0.0)
    optimizer += kept * over(shard)
    transient += 16.0 * over(shard) if candidate.codec != "none" else 0.0
    return weights, gradients, optimizer, transient
