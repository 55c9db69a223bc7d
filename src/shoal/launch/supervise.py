"""The supervisor: starts the workers, watches them from outside, replaces what dies, and says why.

Workers build their model alone and then wait for a generation: the set of ranks that belong
together, with a fresh place to meet. When one dies, the others leave their generation with nothing
applied. Its place is taken by a new worker; the next generation begins when it is there, or at once
without it where the recipe lets the degree shrink. What the newcomer lacks it gets from a living
replica (engine/membership/agree.py). Only when nobody is left does the run go back to its last
checkpoint.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from shoal.checkpoint.objects import is_url
from shoal.config.sync import Server
from shoal.engine.job import Job
from shoal.errors import Stopped
from shoal.launch.attempt import Attempt, gave_up, signals_asked, stopped_at_once
from shoal.launch.callbacks import Callbacks
from shoal.launch.cluster import Cluster, NotYet
from shoal.launch.directory import hosts_to_drain, is_run, requests_in
from shoal.launch.hang import FIRST_SECONDS, Doctor, Sighting, Stuck, report
from shoal.launch.hosts import Hosts, name_of
from shoal.launch.lanes import Lanes
from shoal.launch.links import worker_rate
from shoal.launch.losses import Losses
from shoal.launch.memory import explained
from shoal.launch.pace import Pace
from shoal.launch.pool import Worker, WorkerPool
from shoal.launch.servers import Servers
from shoal.launch.site import Site, Slot
from shoal.launch.sites import Sites, this_host
from shoal.launch.supervised import (
    SupervisedWorker,
    generation_orders,
    is_ending,
    left_behind,
    left_by_another,
    stacks,
)
from shoal.observe.console import Console
from shoal.observe.events import RunFiles
from shoal.observe.record import RunRecord

TARGET = "shoal.launch.worker:run"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 1.0
"""After a user's mistake, the other workers may still say what they saw before they are ended."""


def run_workers(
    job: Job,
    *,
    pool: WorkerPool,
    console: Console,
    begun: Callable[[], None] = lambda: None,
    story: list[dict[str, Any]] | None = None,
    callbacks: Callbacks | None = None,
    sites: Sites | None = None,
) -> Attempt:
    """Start the workers of `job` and see them to their end. Raises the error that ended them.

    SIGINT and SIGTERM ask the workers to save and stop; a second one ends them at once (Stopped
    when there is a checkpoint to resume from, else Interrupted), of SIGTERM only where somebody
    sits at a terminal. SIGUSR1 prints where each is.
    `sites`: where the workers are; by default on this host.
    `story` collects every event, also of a run that ends with an error. An error in `callbacks`
    asks the workers to save and stop.
    """
    heard = callbacks or Callbacks(None)
    given = (sites or this_host)(job, pool)
    with given as (there, cluster), signals_asked() as asked:
        console.steps = job.recipe.train.steps or console.steps  # of epochs: as the start said
        heard.stop = lambda: asked.append(signal.SIGTERM)
        attempt = Attempt(console, begun, story=[] if story is None else story, callbacks=heard)
        if cluster.own_disks or is_url(job.recipe.checkpoint.where):
            job = cluster.placed(job, say=console.line, begins=not job.resume)
        if cluster.own_folders:
            job, attempt.record = replace(job, own_disks=True), RunRecord(job.run)
        supervisor = Supervisor(
            job,
            sites=there,
            cluster=cluster,
            attempt=attempt,
            asked=asked,
        )
        with closing(attempt):
            supervisor.run()
        cluster.ended(status=0 if attempt.stopped is None else Stopped.exit_status)
        return attempt


class Supervisor:
    """Sees one run to its end."""

    def __init__(
        self,
        job: Job,
        *,
        sites: Sequence[Site],
        cluster: Cluster,
        attempt: Attempt,
        asked: list[int],
    ) -> None:
        self._job, self._sites, self._cluster, self._attempt = job, sites, cluster, attempt
        self._asked, self._passed_on = asked, 0
        self._layout, launch = job.decision.layout, job.recipe.launch
        self._threads = job.decision.workers == "threads" and self._layout.workers > 1
        self._size = 1 if self._threads else self._layout.workers
        self._ranks = self._layout.workers
        self._limit = launch.time_limit_seconds
        self._apart = isinstance(job.recipe.sync, Server)
        """Whether each replica is a generation of its own, and meets the others at servers."""
        self._fewest = job.recipe.parallel.fewest_replicas or self._layout.replicate
        """Replicas that must be there for the others to go on while one is replaced."""
        inside = self._layout.replica_workers > 1
        compiles = job.recipe.parallel.compile  # whenever it meets another shape
        silence = max(launch.silence_seconds, FIRST_SECONDS if compiles else 0.0)
        self._doctor = Doctor(
            silence_seconds=silence,
            meets_inside=inside,
            threads=job.decision.threads_per_worker,
            bytes_per_second=worker_rate(job, num_hosts=len(sites)),
        )
        self._pace = Pace()
        self._lanes = Lanes(job.run, num_workers=self._ranks)
        self._run = job.run
        self._generation = 0
        self._members: list[int] = []
        self._held_back = False
        """Whether a generation could begin, and the cluster does not let it yet."""
        self._losses = Losses(sites, retries=launch.retries)
        self._began = self._looked = time.monotonic()
        self._ending: float | None = None
        self._servers = Servers(job, sites=sites, cluster=cluster) if self._apart else None
        if self._servers is not None:
            self._job = job = replace(job, servers=str(self._servers.folder))
        self.workers: list[SupervisedWorker] = []
        self._hosts = Hosts(sites, layout=self._layout, fewest=self._fewest, tell=self._tell)
        if not self._adopt():
            self.workers += (self._started(rank) for rank in range(self._size))

    # --- the watch

    def run(self) -> Attempt:
        """Hear the workers until all have ended well. Raises the error that ended them."""
        while not all(one.worker.told for one in self.workers):
            for worker, message in self._events():
                one = next((one for one in self.workers if one.worker is worker), None)
                if one is None:
                    servers = self._servers
                    if servers is not None and servers.hear(worker, message, tell=self._tell):
                        servers.begin_anew()
                        self._start_again()
                    continue
                if message is not None:
                    self._hear(one, message)
                else:
                    if self._servers is not None:
                        self._servers.gone(self._layout.replica_of(one.rank))
                    if worker.status != 75 and not one.done:
                        self._ended(one)
            self._pass_on()
            self._look()
            if self._ending is not None and time.monotonic() > self._ending:
                break
        attempt = self._attempt
        ended = all(one.done or one.absent for one in self.workers)
        if not ended and attempt.stopped is None:
            raise attempt.failure()
        if self._servers is not None:
            self._servers.close()
        attempt.happened(self._cluster.look(last=True), run=self._run)
        return attempt

    def _events(self) -> Iterator[tuple[Worker, dict[str, Any] | None]]:
        """What happens on all hosts, within a short time on each."""
        for site in self._sites:
            yield from site.events(timeout_seconds=_POLL_SECONDS / len(self._sites))

    def _hear(self, one: SupervisedWorker, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "waiting":
            # else it has left an older one, as it was told to
            if message["generation"] >= one.generation:
                one.waiting = True
                if message["lost"] and self._losses.is_stillborn(message["generation"]):
                    self._hosts.doubt()
                self._form()
        elif kind == "step":
            self._stepped(message)
        elif kind == "fault":
            faults, number = self._job.instruments.planned_faults, message["number"]
            planned = next(fault for fault in faults if fault["number"] == number)
            self._job = self._job.without_fault(number)
            self._tell("fault", {**planned, "at": message["at"]}, to_file=False)
        elif kind == "ended":
            one.done = True
        elif kind != "joined":
            if kind == "error":
                one.error = message
            elif kind == "event" and message["name"] == "saved":
                self._cluster.saved(message["fields"])
            elif kind == "kept":
                self._cluster.kept(one.site, message)
                return
            self._attempt.hear(message)

    def _stepped(self, message: dict[str, Any]) -> None:
        recovered = self._losses.recovered(message, generation=self._generation)
        if recovered is not None:
            self._tell("recovered", recovered)
        slow = self._pace.note(message)
        if slow is not None:
            self._tell("slow-worker", slow)

    def _pass_on(self) -> None:
        """Signals, the time limit, and hosts that are about to go."""
        if self._limit is not None and time.monotonic() - self._began > self._limit:
            self._limit = None
            self._asked.append(signal.SIGTERM)
        self._do_without()
        while signal.SIGUSR1 in self._asked:
            self._asked.remove(signal.SIGUSR1)
            self.describe()
        if len(self._asked) > self._passed_on:
            again, self._passed_on = self._passed_on > 0, len(self._asked)
            if again and (signal.SIGINT in self._asked[1:] or os.isatty(0)):
                raise stopped_at_once(self._run)
            if again:  # a batch system sends SIGTERM more than once
                return
            text = "asked to stop: saving after this step (again: stop at once)"
            self._attempt.console.phase(text)
            self._order({"order": "stop"})

    def _do_without(self) -> None:
        """Start the workers of hosts that are about to go elsewhere; or save and stop."""
        sites, last = self._hosts.leaving()
        leaving = [one for one in self.workers if one.site in sites and one.alive]
        others = [one for one in self.workers if one not in leaving and one.alive]
        held = {self._layout.replica_rank(one.rank) for one in others if one.generation > 0}
        if last or any(self._layout.replica_rank(one.rank) not in held for one in leaving):
            if not self._asked:
                self._asked.append(signal.SIGTERM)
            return
        self._end_at(sites)

    def _leave_out(self) -> None:
        """Go on without hosts that do not reach the others."""
        sites = self._hosts.cut_off()
        if any(one.alive and not one.done and one.site in sites for one in self.workers):
            self._losses.begin(self._generation)
            self._end_at(sites)

    def _end_at(self, sites: Sequence[Site]) -> None:
        """End what runs there; others do its part."""
        there = [one for one in self.workers if one.site in sites]
        ended = [one for one in there if one.alive and not one.done]
        for site in sites:
            site.kill([one.worker for one in ended if one.site is site])
        for one in ended:
            self._recover(one)

    def _order(self, order: dict[str, Any]) -> None:
        for one in self.workers:
            one.site.send(one.worker, order)

    def sightings(self) -> list[Sighting]:
        """Every rank as seen now."""
        return [seen for site in self._sites for seen in site.sightings()]

    def _look(self) -> None:
        """Files that ask for something; a worker that is stuck is named, described and ended."""
        if time.monotonic() - self._looked < _POLL_SECONDS:
            return
        self._looked = time.monotonic()
        for name in requests_in(self._run):
            self._attempt.console.phase(f"found the file {name}: saving after this step")
            if name == "SAVE":
                self._order({"order": "save"})
            elif not self._asked:
                self._asked.append(signal.SIGTERM)  # which outlives the workers that are there
        for name in hosts_to_drain(self._run):
            self._hosts.drain(name)
        if self._servers is not None:
            self._servers.look()
        self._welcome()
        self._leave_out()
        self._attempt.happened(self._cluster.look(), run=self._run)
        if self._held_back:
            self._form()
        for one in left_behind(self.workers) if not self._apart else ():
            one.done = True
            one.site.signal(one.worker, signal.SIGKILL)
        seen = self.sightings()
        self._hosts.watch(seen)
        self._lanes.look(seen)
        for stuck in self._doctor.look(seen)[:1]:
            self._end_stuck(stuck, seen)

    def _end_stuck(self, stuck: Stuck, seen: list[Sighting]) -> None:
        one = self.workers[0 if self._threads else stuck.rank]
        if not one.alive or one.stuck is not None:
            return
        one.stuck = stuck.reason
        stack = one.site.stack(one.worker, stopped="stopped" in stuck.reason)
        for line in [*report(seen), *stack.splitlines()]:
            self._attempt.console.line(f"  {line}")
        fields = {"rank": stuck.rank, "text": f"worker {stuck.rank} {stuck.reason}; it is ended"}
        self._tell("stuck", {**fields, "who": report(seen), "stack": stack})
        one.site.signal(one.worker, signal.SIGKILL)

    def describe(self) -> None:
        """Print where each worker is and what its threads do (the hang doctor, on demand)."""
        for line in [*report(self.sightings()), *stacks(self.workers)]:
            self._attempt.console.line(line)

    # --- losses

    def _ended(self, one: SupervisedWorker) -> None:
        """A worker ended before its time: recover, or give up."""
        if self._attempt.user_error() is not None:
            self._ending = self._ending or time.monotonic() + _GRACE_SECONDS
            return
        death = self._losses.examine(one)
        fields = {"rank": death.rank, "why": death.kind, "step": death.step, "where": death.where}
        text = f"{death.text} ({death.where})"
        self._tell("lost", {**fields, "text": text, "noticed_at": time.monotonic()})
        times, too_often, again = self._losses.count(one, death, generation=self._generation)
        if too_often or (self._passed_on and not self._survives(one)):
            doctor = explained(self._job, death)
            raise gave_up(death, times=times, run=self._run, doctor=doctor, again=again)
        self._losses.begin(self._generation)
        self._recover(one)

    def _survives(self, lost: SupervisedWorker, *, without: bool = False) -> bool:
        """Whether a living worker holds what the lost one held; asked to stop, it will save it.

        `without`: other than that one itself.
        """
        if self._apart:
            return True  # the servers do
        of = self._layout.replica_rank
        equals = [one for one in self.workers if of(one.rank) == of(lost.rank)]
        equals = [one for one in equals if not (without and one is lost)]
        return any(one.alive and one.generation > 0 for one in equals)

    def _recover(self, lost: SupervisedWorker) -> None:
        """Start a worker in its place; if nobody else holds its state, start all anew."""
        if not self._survives(lost):
            self._start_again()
            return
        if self._apart:
            self._replace_replica(lost)
            return
        if lost.generation == self._generation:
            self._order({"order": "lost", "number": self._generation})
        self._replace(lost, joining=True)
        self._form()

    def _welcome(self) -> None:
        """Take hosts in that are back: workers start there that had to wait, or had gone elsewhere.

        Those that train meanwhile give their place up only when others hold what they hold.
        """
        ready = self._hosts.look()
        if is_ending(self.workers):
            return
        for one in self.workers:
            own = self._hosts.own(one.rank)
            if own not in ready:
                continue
            if one.absent:
                self._replace(one, joining=self._survives(one))
            elif one.alive and one.site is not own and self._survives(one, without=True):
                one.site.kill([one.worker])
                self._order({"order": "lost", "number": one.generation})
                self._replace(one, joining=True)

    def _start_again(self) -> None:
        """Nobody has the state any more: all go back to the last save."""
        for site in self._sites:
            site.kill([one.worker for one in self.workers if one.alive and one.site is site])
        self._job = self._cluster.placed(self._job, say=self._attempt.console.line)
        for one in self.workers:
            self._replace(one)
        start = "last checkpoint" if self._job.resume else "beginning"
        self._tell("restarted", {"text": f"all workers start again from the {start}"})

    def _adopt(self) -> bool:
        """Go on with what a lost coordinator has left; whether there is a whole state of it."""
        left = left_by_another(self._sites, layout=self._layout)
        if not left:
            return False
        self._generation = max(one.generation for one in left)
        self._losses.begin(self._generation)
        self.workers, self._members = left, [one.rank for one in left]
        for one in left:
            one.site.send(one.worker, {"order": "lost", "number": one.generation})
        missing = [rank for rank in range(self._size) if rank not in self._members]
        self.workers += [self._started(rank, joining=True) for rank in missing]
        self.workers.sort(key=lambda one: one.rank)
        text = f"workers {self._members} go on where they are; {missing or 'none'} join them"
        self._tell("adopted", {"members": self._members, "text": text})
        self._form()
        return True

    def _replace_replica(self, lost: SupervisedWorker) -> None:
        """Start the whole replica of a lost worker anew; the servers know where it was."""
        of = self._layout.replica_of
        for one in self.workers:
            if of(one.rank) == of(lost.rank):
                if one.alive:
                    one.site.kill([one.worker])
                self._replace(one, joining=True)
        if self._servers is not None:
            self._servers.came(of(lost.rank))

    def _replace(self, one: SupervisedWorker, *, joining: bool = False) -> None:
        vars(one).update(vars(self._started(one.rank, joining=joining)))

    def _started(self, rank: int, *, joining: bool = False) -> SupervisedWorker:
        """A new worker for `rank`, on the host that its replica belongs to, if that is there."""
        site = self._hosts.place(rank, workers=self.workers)
        if site is None:
            nobody = Worker(-1, report=-1, status=-signal.SIGKILL, open=False, told=True)
            return SupervisedWorker(rank, self._hosts.own(rank), nobody, absent=True)
        ranks = range(self._ranks) if self._threads else [rank]
        payload = {**replace(self._job, joining=joining).to_json(), "rank": rank}
        payload["size"] = self._size
        return SupervisedWorker(
            rank, site, site.start(TARGET, payload, slot=Slot(rank), ranks=ranks)
        )

    def _form(self) -> None:
        """Announce a generation when one is needed and enough replicas can be in it."""
        if self._apart:
            self._form_apart()
            return
        now = self._generation
        able = [s for s in self.workers if s.alive and (s.waiting or 0 < s.generation == now)]
        of, size = self._layout.replica_of, 1 if self._threads else self._layout.replica_workers
        replicas = Counter(of(one.rank) for one in able)
        members = [one for one in able if replicas[of(one.rank)] == size]
        changed = any(s.waiting for s in members) or [s.rank for s in members] != self._members
        there = sum(not one.absent for one in self.workers)
        enough = there if self._threads or not self._members else self._fewest * size
        self._held_back = changed and len(members) >= enough and not is_ending(self.workers)
        if self._held_back and not self._hosts.in_doubt:
            self._announce(members)

    def _form_apart(self) -> None:
        """Announce to each replica that is whole a generation of its own."""
        of = self._layout.replica_of
        for replica in range(self._layout.replicate):
            members = [one for one in self.workers if of(one.rank) == replica]
            if all(one.alive and one.waiting for one in members):
                self._generation += 1
                meeting = self._cluster.meeting(self._generation)
                self._send_generation(members, meeting=meeting)

    def _announce(self, members: list[SupervisedWorker]) -> None:
        try:
            hosts = [name_of(one.site) for one in members]
            meeting = self._cluster.meeting(self._generation + 1, hosts=hosts)
        except NotYet:
            return  # asked again, with those that are there then
        self._held_back, first = False, not self._members
        self._generation = self._cluster.registered or self._generation + 1
        self._members = [one.rank for one in members]
        self._send_generation(members, meeting=meeting)
        if not first:
            count = len(members) // self._layout.replica_workers
            text = f"generation {self._generation}: {count} replicas (workers {self._members})"
            known = {"generation": self._generation, "members": self._members}
            self._tell("generation", {**known, "text": text})

    def _send_generation(self, members: list[SupervisedWorker], *, meeting: str) -> None:
        known = {"meeting": meeting, "registered": self._cluster.registered > 0}
        orders = generation_orders(members, number=self._generation, cluster=self._cluster)
        for one, order in orders:
            one.site.send(one.worker, {**order, **known})

    def _tell(self, name: str, fields: dict[str, Any], *, to_file: bool = True) -> None:
        """Write an event of ours, show it, keep it for who asked for the run."""
        self._attempt.story.append({"event": name, "monotonic": time.monotonic(), **fields})
        if to_file:
            if is_run(self._run):  # else a start that fails would leave half a run behind
                files = RunFiles(self._run)
                files.event(name, fields)
                files.close()
            self._attempt.console.event(name, fields)
