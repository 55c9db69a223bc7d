"""Config becomes objects: the one place where a recipe's sections meet the parts they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint.objects import Objects, is_url
from shoal.checkpoint.remote import ObjectStore
from shoal.checkpoint.store import Store
from shoal.comm.flat import Vector
from shoal.comm.group import Group
from shoal.config.recipe import OnGrid, Recipe
from shoal.config.sync import EveryStep
from shoal.data.stream import Evaluation
from shoal.data.tokenize import load_tokenizer
from shoal.engine.batches import batches_of
from shoal.engine.decision import Decision
from shoal.engine.ending import Watch
from shoal.engine.folded import adapter_settings
from shoal.engine.instruments import faults, mistakes, recorder
from shoal.engine.job import Inputs, Job
from shoal.engine.passes import OneByOne, Passes
from shoal.engine.rollouts import MakesWrites, writes_for
from shoal.engine.schedule import rate_factor
from shoal.engine.state import FlatState, allocate_for
from shoal.engine.step import Step, StepSettings
from shoal.engine.training import Training
from shoal.engine.update import Update
from shoal.legal import schedule_takes
from shoal.models.adapter import fill_rounded
from shoal.models.adapter_files import AdapterFolder
from shoal.models.grid import Grid
from shoal.models.huggingface import build_meta
from shoal.models.init import Source
from shoal.models.on_grid import GridSettings
from shoal.models.pretrained import PretrainedWeights
from shoal.models.rounded_base import floats_of, in_buffer
from shoal.observe.events import Report
from shoal.parallel.model import ModelSettings, model_config
from shoal.parallel.player import Player
from shoal.parallel.precision import LossScale, check_compute
from shoal.parallel.ranks import Ranks
from shoal.parallel.replica import Replica, build_replica, cut, fill, frozen_model, mark_logits
from shoal.parallel.settings import Settings
from shoal.runtime import WorkerInfo
from shoal.sync.kinds import KEEPS_EQUAL_STATE, KINDS, create
from shoal.sync.policy import Division, Given, Place, Policy
from shoal.tasks.kinds import create as create_task
from shoal.tasks.task import Task


def build(
    job: Job,
    *,
    ranks: Ranks,
    worker: WorkerInfo,
    report: Report,
    make_writes: MakesWrites | None = None,
) -> Training:
    """Build one rank's objects. Raises the errors of the parts it builds.

    Collective inside a replica of several workers: raises PeersLost when one goes.
    """
    recipe, decision = job.recipe, job.decision
    task = _task(job)
    replica = build_replica(model_settings(recipe, inputs=job.inputs, task=task))
    task.model_config = replica.model.config
    if job.inputs.companion_directory is not None:
        task.companion = frozen_model(
            job.inputs.companion_directory, like=replica.settings, device=worker.device
        )
    base = _pretrained(job, replica=replica)
    settings = strategy_settings(recipe, decision)
    cut(replica, mesh=ranks.mesh, settings=settings)
    state = _state(job, replica=replica, base=base, group=ranks.world)
    mark_logits(replica, compiled=recipe.parallel.compile)
    ranks.attach(replica.model)
    if worker.rank == 0:
        _report_notes(report, source=None if job.joining else base, replica=replica)
    dtype = check_compute(decision.compute, device=worker.device)
    loss_scale = LossScale.of(dtype)
    passes = _passes(
        replica,
        ranks=ranks,
        schedule=settings.schedule,
        task=task,
        dtype=dtype,
        device=worker.device,
        pulse=ranks.world.pulse,
        scales_loss=loss_scale is not None,
    )
    play = Player(passes.logits, ranks, replica.is_cut, job.inputs.tokenizer_directory)
    play.writes = writes_for(job, make_writes, replica, task, state, worker, report)
    stream = batches_of(recipe, job.inputs, task=task, play=play)
    steps = recipe.train.num_steps(steps_per_epoch=stream.steps_per_epoch)
    policy = _policy(job, ranks=ranks, worker=worker, state=state, steps=steps, report=report)
    training = Training(
        job=job,
        ranks=ranks,
        replica=replica,
        settings=settings,
        task=task,
        state=state,
        policy=policy,
        passes=passes,
        step=_step(
            job,
            replica,
            task=task,
            passes=passes,
            state=state,
            ranks=ranks,
            policy=policy,
            scale=loss_scale,
        ),
        update=_update(
            job, replica, state=state, policy=policy, steps=steps, scale=loss_scale, dtype=dtype
        ),
        store=_store(job),
        watch=_watch(recipe, policy=policy, task=task),
        stream=stream,
        play=play,
        evaluation=_evaluation(job),
        steps=steps,
        loss_scale=loss_scale,
    )
    policy.remember = training.facts
    _attach_instruments(job, training, report, rank=worker.rank)
    return training


def _store(job: Job) -> Store:
    """Where the run is saved."""
    where = job.recipe.checkpoint.where
    if is_url(where):
        return ObjectStore(Objects(where), start=job.start)
    return Store(job.run / "checkpoints")


def _watch(recipe: Recipe, *, policy: Policy, task: Task) -> Watch:
    return Watch(
        recipe.train,
        keep_best=recipe.checkpoint.keep_best,
        alone=policy.alone and not policy.apart,
        falls=task.loss_falls,
    )


def _evaluation(job: Job) -> Evaluation:
    return Evaluation(
        Path(job.inputs.data_directory),
        batch_samples=job.decision.micro_batch_samples,
        samples=job.recipe.data.evaluation_samples,
    )


def _task(job: Job) -> Task:
    task = create_task(
        job.recipe.task.kind, settings=job.inputs.task_settings, options=job.recipe.task
    )
    if task.writes_text and job.inputs.tokenizer_directory is not None:
        task.tokenizer = load_tokenizer(job.inputs.tokenizer_directory)
    return task


def _passes(replica: Replica, *, ranks: Ranks, schedule: str, **named: Any) -> Passes:
    """How this replica computes."""
    if replica.sharded.stages is None:
        return OneByOne(replica, **named)
    from shoal.engine.pipeline_passes import Scheduled  # half a second of imports of torch

    return Scheduled(replica, schedule=schedule, traffic=ranks.world.traffic, **named)


def _place(
    job: Job, *, ranks: Ranks, worker: WorkerInfo, state: FlatState, steps: int, report: Report
) -> Place | None:
    """Where this worker stands among those that meet at servers; None where there are none."""
    if job.servers is None:
        return None
    layout, train = job.decision.layout, job.recipe.train

    def say(text: str) -> None:
        report.say("progress", text=f"replica {layout.replica_of(worker.rank)} {text}", done=None)

    return Place(
        replica=layout.replica_of(worker.rank),
        replicas=layout.replicate,
        position=ranks.replica_rank,
        servers=Path(job.servers),
        optimizer=train.optimizer,
        rate=lambda step: rate_factor(step, steps=steps, schedule=train.schedule),
        states={kind: vector.tensor for kind, vector in state.vectors.items()},
        say=say,
    )


def _policy(
    job: Job, *, ranks: Ranks, worker: WorkerInfo, state: FlatState, steps: int, report: Report
) -> Policy:
    recipe = job.recipe
    schedule = job.decision.schedule_of(recipe)[0]
    least, multiple = schedule_takes(schedule, ranks=ranks.layout.pipeline)
    division = Division(
        recipe.train.global_batch_samples,
        job.decision.micro_batch_samples,
        ranks.layout.shard,
        least=least,
        multiple=multiple,
    )
    values = state.values[: state.trainable_numel]
    given = Given(
        division,
        values,
        state.layout,
        steps,
        recipe.seed,
        _place(job, ranks=ranks, worker=worker, state=state, steps=steps, report=report),
    )
    alone = KINDS[recipe.sync.kind].apart and job.servers is None  # only scores, or is timed
    policy = create(EveryStep() if alone else recipe.sync, given)
    policy.enter(world=ranks.world, peers=ranks.peers, inside=ranks.inside)
    state.add(policy.vectors())
    return policy


def _step(
    job: Job,
    replica: Replica,
    *,
    task: Task,
    passes: Passes,
    state: FlatState,
    ranks: Ranks,
    policy: Policy,
    scale: LossScale | None,
) -> Step:
    settings = StepSettings(
        micro_batch_samples=job.decision.micro_batch_samples,
        global_batch_samples=job.recipe.train.global_batch_samples,
        exact=job.recipe.train.exact,
        loss_scale=scale,
    )
    return Step(
        replica,
        task=task,
        passes=passes,
        state=state,
        ranks=ranks,
        policy=policy,
        settings=settings,
    )


def _update(
    job: Job,
    replica: Replica,
    *,
    state: FlatState,
    policy: Policy,
    steps: int,
    scale: LossScale | None,
    dtype: torch.dtype,
) -> Update:
    train = job.recipe.train
    return Update(
        state,
        policy=policy,
        cut_norm=replica.norm if replica.is_cut else None,
        optimizer=train.optimizer,
        schedule=train.schedule,
        steps=steps,
        max_gradient_norm=train.max_gradient_norm,
        loss_scale=scale,
        compute=dtype,
        keep_zeros=train.keep_zeros,
    )


def strategy_settings(recipe: Recipe, decision: Decision) -> Settings:
    """How the strategies behave: as the recipe says, unless the plan has chosen."""
    schedule, stages_per_rank = decision.schedule_of(recipe)
    return Settings(
        shard_level=decision.shard_level_of(recipe),
        recompute=decision.recompute_of(recipe),
        compile=recipe.parallel.compile,
        offload=recipe.parallel.sharding.offload,
        context_kind=recipe.parallel.rows.kind,
        schedule=schedule,
        stages_per_rank=stages_per_rank,
        split=tuple(recipe.parallel.pipelining.split or ()),
    )


def model_settings(recipe: Recipe, *, inputs: Inputs, task: Task) -> ModelSettings:
    """What the recipe's model is built from. Raises ModelError."""
    config = model_config(
        recipe.model,
        vocabulary_size=inputs.vocabulary_size,
        directory=inputs.model_directory,
        task_settings=task.model_settings(),
        auto_class=task.auto_class,
    )
    return ModelSettings(
        config,
        task.auto_class,
        recipe.seed,
        recipe.model.dropout,
        recipe.train.freeze,
        adapter_settings(recipe, inputs=inputs),
        recipe.model.balance,
        grid_settings(recipe.train.quantise),
    )


def grid_settings(section: OnGrid | None) -> GridSettings | None:
    """How weights are rounded while they are trained, if they are."""
    if section is None:
        return None
    return GridSettings(Grid(section.bits, section.group, section.half), section.keep)


def _state(
    job: Job, *, replica: Replica, base: PretrainedWeights | None, group: Group
) -> FlatState:
    """The state, and the model over it; where ranks share memory, rank 0 fills it for all.

    What lies in the folder of `base` and is frozen under an adapter is in no checkpoint.
    """
    recipe, adapted = job.recipe, replica.settings.adapter is not None
    source: Source | None = None if job.joining else base
    if source is not None and job.inputs.adapter_directory is not None:
        settings = replica.settings.adapter
        source = AdapterFolder(job.inputs.adapter_directory).over(
            source, model=replica.model, kept_in=settings.base if settings else "float32"
        )
    kept = replica.frozen.difference(base.missing) if adapted and base is not None else frozenset()
    state = allocate_for(
        replica,
        group=group,
        optimizer=recipe.train.optimizer,
        dtype=torch.float64 if job.double else torch.float32,
        equal=recipe.sync.kind in KEEPS_EQUAL_STATE,
        unsaved=frozenset(kept),
    )
    draws = not job.joining and (not group.computes_in_place or group.rank == 0)
    fill(
        replica,
        storage=state.named("parameter"),
        gradients=state.trainable(state.gradients),
        source=source,
        draws=draws,
    )
    if replica.rounded:
        _fill_rounded(replica, group=group, state=state, source=source if draws else None)
    if group.shares_memory:
        group.barrier()
    return state


def _fill_rounded(
    replica: Replica, *, group: Group, state: FlatState, source: Source | None
) -> None:
    """Frozen matrices in few bits: state that is hashed, repaired and handed on, never saved."""
    device = replica.sharded.storage_device
    settings = replica.settings.adapter
    assert settings is not None, "rounded matrices stand beside adapters"
    form = settings.base
    flat = group.buffer(floats_of(replica.rounded, form), dtype=torch.float32, device=device)
    state.add([Vector("rounded-base", flat, frozenset(), steady=True)])
    fill_rounded(replica.model, in_buffer(replica.rounded, flat, form), source=source)


def _pretrained(job: Job, *, replica: Replica) -> PretrainedWeights | None:
    """The weights that the recipe names; a rank that joins gets its state from another."""
    folder = job.inputs.model_directory
    if folder is None or (job.joining and job.recipe.model.adapter is None):
        return None
    settings, model = replica.settings, replica.model
    if replica.rounded:  # of which it has no parameters
        model = build_meta(settings.config, auto_class=settings.auto_class)
    weights = PretrainedWeights(folder, model=model)
    if job.score is not None:
        weights.refuse_missing()
    return weights


def _report_notes(report: Report, *, source: PretrainedWeights | None, replica: Replica) -> None:
    notes = [("model", note) for note in (source.notes() if source is not None else [])]
    for name, note in [*notes, *(("dropout", note) for note in replica.notes)]:
        report.say("event", name=name, fields={"text": note})


def _attach_instruments(job: Job, training: Training, report: Report, *, rank: int) -> None:
    """What a proof, a rehearsal or a test has attached to the run."""
    wanted = job.instruments
    if wanted.planned_faults:
        faults.attach(wanted.planned_faults, training, report, rank=rank)
    if wanted.record:
        recorder.attach(training, report)
    if wanted.mistake is not None:
        mistakes.attach(wanted.mistake, training, report)
