"""Membership of hosts: one of them coordinates, and only a transaction of the store decides.

- No lease, clock or time-out is proof that one may write: a lease that ends only tells the others
  when to try. Every write names the revision of what it relies on, so whoever was paused, cut off
  or deposed is refused.
- A generation's revision in the store is the fencing token of its saves (Kleppmann, "How to do
  distributed locking", 2016): a save commits only while its generation is the last one.
- A change whose answer did not come is sent again with the same nonce: either both do nothing, or
  one was made, and the nonce says that it was ours.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shoal.config.locked import differences
from shoal.errors import ShoalError
from shoal.launch.registry.records import (
    MOST_BYTES,
    Ask,
    Generation,
    HostFacts,
    Saved,
    Spec,
    Standing,
)
from shoal.launch.registry.store import Compare, Entry, Store, Unknown

LEASE_SECONDS = 6
RENEW_SECONDS = 2.0
_TRIES = 3
_HOST, _ASK = "hosts/", "asks/"


class Refused(ShoalError):
    """This host cannot take part; says what differs, and from whom."""


class Fenced(ShoalError):
    """Another generation or coordinator counts by now: what this one wrote does not."""


@dataclass(frozen=True)
class View:
    """All that the registry holds, as of one moment."""

    spec: Spec | None = None
    hosts: Mapping[str, HostFacts] = field(default_factory=dict)
    coordinator: str | None = None
    term: int = 0
    """Revision at which the coordinator became it."""
    generation: Generation | None = None
    token: int = 0
    """Revision of the generation; 0: there was none yet."""
    commit: Saved | None = None
    commit_revision: int = 0
    asks: Mapping[str, Ask] = field(default_factory=dict)


class Membership:
    """What one host's agent asks of the store of its run."""

    def __init__(
        self, store: Store, host: HostFacts, *, lease_seconds: int = LEASE_SECONDS
    ) -> None:
        self._store, self.host, self._seconds = store, host, lease_seconds
        self._lease: int | None = None

    def enrol(self, spec: Spec) -> View:
        """Take part. Raises Refused where the run is another one; Unreachable, Unknown."""
        mine = _bytes(spec)
        self._put({"spec": mine}, when=[Compare("spec", "changed", 0)])
        view = self.look()
        assert view.spec is not None, "somebody has written it"
        if view.spec != spec:
            raise Refused(_differences(spec, view.spec, view=view, name=self.host.name))
        self._lease = self._store.grant(self._seconds)
        self.tell(self.host)
        return self.look()

    def tell(self, facts: HostFacts) -> None:
        """Write what is known of this host now. Raises Fenced once its lease has ended."""
        self.host = facts
        try:
            self._put({f"{_HOST}{facts.host}": _bytes(facts)}, lease=self._held())
        except LookupError:
            raise Fenced(f"{facts.name}: its lease has ended; it has to enrol again") from None

    def keep(self) -> bool:
        """Renew the lease, every RENEW_SECONDS; False: it has ended, and the host must enrol again.

        Raises Unreachable.
        """
        return self._lease is not None and self._store.keep(self._lease)

    def look(self) -> View:
        """What is so now, or was a moment after the call. Raises Unreachable, Refused."""
        return _view(self._store.read())

    def lead(self) -> int | None:
        """Become or remain the coordinator: the term; None: another is. Unreachable, Unknown."""
        mine = self.host.host.encode()
        try:
            self._put(
                {"coordinator": mine},
                when=[Compare("coordinator", "created", 0)],
                lease=self._held(),
            )
        except LookupError:
            return None
        view = self.look()
        return view.term if view.coordinator == self.host.host else None

    def announce(self, generation: Generation, *, term: int, after: int) -> int:
        """Make it the one that counts; its token. `after`: the token of the one it follows.

        Raises Fenced where this is no longer the coordinator, or another generation came between;
        Unreachable, Unknown.
        """
        nonce = secrets.token_hex(8)
        record = msgspec.structs.replace(generation, nonce=nonce)
        when = [Compare("coordinator", "created", term), Compare("generation", "changed", after)]
        revision = self._put({"generation": _bytes(record)}, when=when)
        if revision is not None:
            return revision
        view = self.look()
        if view.generation is not None and view.generation.nonce == nonce:
            return view.token  # sent twice, and the first one was made
        last = view.generation
        raise Fenced(
            f"generation {generation.number} by {self.host.name} does not count: "
            + f"{view.coordinator or 'nobody'} coordinates"
            + (f", generation {last.number} is the last" if last else "")
        )

    def commit(self, saved: Saved, *, token: int) -> None:
        """Make a save the one that is loaded. Idempotent.

        Raises Fenced where `token` is not that of the last generation, or a later save counts;
        Unreachable, Unknown (then it may be called again).
        """
        for _ in range(_TRIES):
            view = self.look()
            last = view.commit
            if last is not None and last.standing >= saved.standing:
                if last == saved:
                    return
                raise Fenced(f"step {saved.step} does not count: step {last.step} is committed")
            if view.token != token:
                number = view.generation.number if view.generation else 0
                raise Fenced(
                    f"step {saved.step} of generation {saved.generation} does not count: "
                    f"generation {number} is the last"
                )
            when = [
                Compare("generation", "changed", token),
                Compare("commit", "changed", view.commit_revision),
            ]
            if self._put({"commit": _bytes(saved)}, when=when) is not None:
                return
        raise Fenced(f"step {saved.step}: others commit at the same time")

    def ask(self, what: Ask) -> str:
        """Ask the coordinator for something; the ask's number. Raises Unknown."""
        number = secrets.token_hex(8)
        self._put({f"{_ASK}{number}": _bytes(what)})
        return number

    def answered(self, number: str, *, term: int) -> None:
        """Take an ask off the list, as its coordinator. Raises Unknown."""
        self._put({}, when=[Compare("coordinator", "created", term)], delete=[f"{_ASK}{number}"])

    def leave(self) -> None:
        """Go: the lease ends, and with it what this host is. Raises Unreachable."""
        if self._lease is not None:
            self._store.revoke(self._lease)
            self._lease = None

    def _held(self) -> int:
        if self._lease is None:
            raise LookupError("not enrolled")
        return self._lease

    def _put(
        self,
        put: Mapping[str, bytes],
        *,
        when: Sequence[Compare] = (),
        delete: Sequence[str] = (),
        lease: int | None = None,
    ) -> int | None:
        """A change, sent again where no answer came: harmless, since what it puts is the same."""
        for left in reversed(range(_TRIES)):
            try:
                return self._store.change(put, when=when, delete=delete, lease=lease)
            except Unknown:
                if not left:
                    raise
        raise AssertionError("unreachable")


def _view(entries: Mapping[str, Entry]) -> View:
    def of(key: str, kind: type[msgspec.Struct]) -> msgspec.Struct | None:
        return _record(key, entries[key].value, kind) if key in entries else None

    def below(prefix: str, kind: type[msgspec.Struct]) -> dict[str, msgspec.Struct]:
        return {
            key.removeprefix(prefix): _record(key, entry.value, kind)
            for key, entry in entries.items()
            if key.startswith(prefix)
        }

    leading, generation = entries.get("coordinator"), entries.get("generation")
    return View(
        spec=of("spec", Spec),  # type: ignore[arg-type]
        hosts=below(_HOST, HostFacts),  # type: ignore[arg-type]
        coordinator=leading.value.decode("utf-8", "replace") if leading else None,
        term=leading.created if leading else 0,
        generation=of("generation", Generation),  # type: ignore[arg-type]
        token=generation.changed if generation else 0,
        commit=of("commit", Saved),  # type: ignore[arg-type]
        commit_revision=entries["commit"].changed if "commit" in entries else 0,
        asks=below(_ASK, Ask),  # type: ignore[arg-type]
    )


def _bytes(record: msgspec.Struct) -> bytes:
    found = msgspec.json.encode(record)
    if len(found) > MOST_BYTES:
        raise Refused(f"a record of {len(found)} bytes, at most {MOST_BYTES} are written")
    return found


def _record(key: str, value: bytes, kind: type[msgspec.Struct]) -> msgspec.Struct:
    try:
        if len(value) > MOST_BYTES:
            raise msgspec.ValidationError(f"{len(value)} bytes")
        return msgspec.json.decode(value, type=kind)
    except msgspec.MsgspecError as error:
        raise Refused(
            f"the registry's {key} is none of this version of shoal ({error})\n"
            "    start all hosts with the same version"
        ) from None


def _differences(mine: Spec, theirs: Spec, *, view: View, name: str) -> str:
    others = ", ".join(sorted(each.name for each in view.hosts.values())) or "those before it"
    both = _values(mine), _values(theirs)
    lines = [
        f"    {key}: {here} here, {there} there" for key, there, here in differences(*both[::-1])
    ]
    return (
        f"{name} cannot take part in a run of {others}: it differs\n"
        + "\n".join(lines)
        + "\n    give all hosts the same version, recipe and data"
    )


def _values(spec: Spec) -> dict[str, Any]:
    found = msgspec.structs.asdict(spec)
    with suppress(msgspec.DecodeError):
        found["recipe"] = msgspec.json.decode(spec.recipe)
    return found


def newest(held: Mapping[str, HostFacts]) -> tuple[Standing, list[str]]:
    """The furthest state that hosts hold, and who holds it. Raises ValueError for no host."""
    best = max(Standing(*each.standing) for each in held.values())
    return best, sorted(name for name, each in held.items() if Standing(*each.standing) == best)
