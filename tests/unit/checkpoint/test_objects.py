"""Saves in a store of objects: which of them count, whoever writes, and what is left of others."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from shoal.boxes import Box, Piece
from shoal.checkpoint.manifest import NAME
from shoal.checkpoint.objects import Objects, StoreError
from shoal.checkpoint.remote import ObjectStore, Start
from shoal.errors import CheckpointError, RunError


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    import fsspec

    yield f"memory://{tmp_path.name}/store"
    fsspec.filesystem("memory").store.clear()


def whole(value: float) -> Piece:
    tensor = torch.full((5,), value)
    return Piece("w", "parameter", (5,), Box.whole((5,)), tensor)


def writer(url: str, *, begins: bool = False, by: str = "somebody") -> ObjectStore:
    store = ObjectStore(Objects(url))
    store.claim(by=by, begins=begins, on_bad=lambda why: None)
    return store


def save(store: ObjectStore, step: int, value: float, *, keep: int = 9, token: str = "ab") -> None:
    part = store.write_part(step, rank=0, pieces=[whole(value)], token=token)
    store.publish(step, parts=[part], state={}, keep=keep, token=token)


def value_of(url: str, step: int) -> float:
    return ObjectStore(Objects(url)).open(step).read("w")[0].item()


def at_once(*calls: Callable[[], None]) -> list[BaseException | None]:
    """Do all of it at the same moment; what each raised."""
    gate, raised = threading.Barrier(len(calls)), dict[int, BaseException | None]()

    def do(number: int) -> None:
        gate.wait()
        raised[number] = None
        try:
            calls[number]()
        except BaseException as error:
            raised[number] = error

    threads = [threading.Thread(target=do, args=(n,)) for n in range(len(calls))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return [raised[number] for number in range(len(calls))]


def test_what_is_written_comes_back_and_goes(url: str, tmp_path: Path) -> None:
    objects = Objects(url)
    objects.check()
    assert objects.sizes() == {}
    size, _ = objects.write("a/b", [b"12", memoryview(b"345")])
    objects.create("c", b"6")
    assert objects.sizes() == {"a/b": 5, "c": 1} and size == 5
    assert objects.read("a/b") == b"12345"
    seen: list[int] = []
    objects.bring("a/b", tmp_path / "b", most=5, tell=seen.append)
    assert (tmp_path / "b").read_bytes() == b"12345" and seen == [5]
    with pytest.raises(FileNotFoundError):
        objects.read("none")
    objects.remove(["a/b", "c", "none"])
    assert objects.sizes() == {}


def test_of_many_who_create_an_object_one_has(tmp_path: Path) -> None:
    objects = Objects(f"file://{tmp_path}")
    for number in range(30):
        names = [bytes([each]) * 1000 for each in range(6)]
        raised = at_once(*(partial(objects.create, f"{number}", each) for each in names))
        assert [type(error) for error in raised if error] == [FileExistsError] * 5
        assert objects.read(f"{number}") == names[raised.index(None)]
    assert len(objects.sizes()) == 30, "nothing is left beside"


def test_a_store_that_writes_over_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that does not know If-None-Match; of two runs both would count."""

    def create(self: Objects, name: str, content: bytes) -> None:
        self.write(name, [content])

    monkeypatch.setattr(Objects, "create", create)
    with pytest.raises(StoreError, match="writes over an object that only may be created"):
        Objects(url).check()
    assert Objects(url).sizes() == {}


def test_a_save_counts_once_its_manifest_is_there(url: str) -> None:
    store = writer(url, begins=True)
    part = store.write_part(10, rank=0, pieces=[whole(1.0)], token="ab")
    other = store.write_part(10, rank=1, pieces=[], token="ab")
    assert store.steps() == []
    store.publish(10, parts=[part, other], state={"note": "snow☃"}, keep=2, token="ab")
    reader = ObjectStore(Objects(url)).open(10)
    assert reader.state == {"note": "snow☃"} and reader.read("w").tolist() == [1.0] * 5


def test_a_part_that_is_not_there_prevents_it(url: str) -> None:
    store = writer(url, begins=True)
    part = store.write_part(10, rank=0, pieces=[whole(1.0)], token="ab")
    store.objects.remove([f"step-00000010.s1/{part.files[0].file}"])
    with pytest.raises(StoreError, match="is not whole there"):
        store.publish(10, parts=[part], state={}, keep=2, token="ab")
    assert store.steps() == []


def test_of_two_writers_of_a_step_one_counts(url: str) -> None:
    """Two of one start, as where the first rank has moved while its old one still writes."""
    for step in range(1, 21):
        both = [ObjectStore(Objects(url), start=1) for _ in range(2)]
        if step == 1:
            both[0].claim(by="me", begins=True, on_bad=print)
        known = [{"value": float(n), "keep": 99, "token": f"{n}{n}"} for n in range(2)]
        raised = at_once(*(partial(save, each, step, **more) for each, more in zip(both, known)))
        (lost,) = [error for error in raised if error is not None]
        assert isinstance(lost, StoreError)
        words = ("another writer has saved this step", "is not whole there")  # the other removed it
        assert any(each in str(lost) for each in words)
        assert value_of(url, step) == raised.index(None), "and it can be read, though both wrote"


def test_of_two_starts_at_once_one_writes(url: str) -> None:
    save(writer(url, begins=True), 10, 1.0)
    stores = [ObjectStore(Objects(url)) for _ in range(2)]
    raised = at_once(
        *(lambda n=n: stores[n].claim(by=f"host {n}", begins=False, on_bad=print) for n in range(2))
    )
    won = raised.index(None)
    numbers = {stores[n].start for n in range(2) if raised[n] is None}
    assert len(numbers) == raised.count(None), "no two have the same number"
    for error in raised:  # they may have come one after the other
        assert error is None or f"host {won} has begun at the same moment" in str(error)


def test_whoever_is_not_the_newest_start_saves_nothing_that_counts(url: str) -> None:
    """A random history of starts and saves against a model of what has to count."""
    draw = random.Random(7)
    writers: list[ObjectStore] = []
    counts: dict[int, tuple[int, float]] = {}  # step -> (start, value)
    taken: set[tuple[int, int]] = set()
    for turn in range(150 if url.startswith("memory") else 40):
        if not writers or draw.random() < 0.15:
            before = max(counts, default=None)
            store = ObjectStore(Objects(url))
            found = store.claim(by="x", begins=not writers, on_bad=print)
            assert found == before
            writers.append(store)
            continue
        number = draw.choice([len(writers) - 1, draw.randrange(len(writers))])
        step, token = draw.randrange(1, 40), f"{turn:04x}"
        newest = number == len(writers) - 1
        try:
            save(writers[number], step, float(turn), keep=99, token=token)
        except StoreError:
            assert not newest or (number, step) in taken
        else:
            assert newest and (number, step) not in taken
            taken.add((number, step))
            counts[step] = (number, float(turn))
        assert writers[-1].steps() == sorted(counts)
    assert len(writers) > 4 and len(counts) > 8
    for step, (_, value) in counts.items():
        assert value_of(url, step) == value


class InTurns(Objects):
    """Does each operation when it is its turn."""

    def __init__(self, url: str, name: str, turns: Turns) -> None:
        super().__init__(url)
        self._name, self._turns = name, turns

    def create(self, name: str, content: bytes) -> None:
        with self._turns.of(self._name):
            super().create(name, content)

    def sizes(self) -> dict[str, int]:
        with self._turns.of(self._name):
            return super().sizes()

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with self._turns.of(self._name):
                super().remove([name])


class Turns:
    """Lets two threads do one operation each in a given order; who has ended is passed over."""

    def __init__(self, order: Sequence[str]) -> None:
        self._left, self._ended = list(order), set[str]()
        self._changed = threading.Condition()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._next() in (name, None), timeout=10)
            yield
            if self._left:
                self._left.pop(0)
            self._changed.notify_all()

    def end(self, name: str) -> None:
        with self._changed:
            self._ended.add(name)
            self._changed.notify_all()

    def _next(self) -> str | None:
        while self._left and self._left[0] in self._ended:
            self._left.pop(0)
        return self._left[0] if self._left else None


ORDERS = list(itertools.combinations(range(12), 5))
"""Which of twelve operations are those of who goes on; the others are of who saves."""


@pytest.mark.parametrize(
    "orders",
    [random.Random(3).sample(ORDERS, 30), pytest.param(ORDERS, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_who_goes_on_while_another_saves_has_what_it_goes_on_from(
    orders: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """Though that one keeps its newest save only, and removes the one before."""
    for number, places in enumerate(orders):
        url = f"memory://{tmp_path.name}/{number}"
        save(writer(url, begins=True), 10, 1.0, keep=1)
        turns = Turns(["goes on" if at in places else "saves" for at in range(12)])
        found: list[int | None] = []

        def goes_on(url: str = url, turns: Turns = turns, found: list[int | None] = found) -> None:
            store = ObjectStore(InTurns(url, "goes on", turns))
            try:
                found.append(store.claim(by="x", begins=False, on_bad=pytest.fail))
            finally:
                turns.end("goes on")

        def saves(url: str = url, turns: Turns = turns) -> None:
            try:
                save(ObjectStore(InTurns(url, "saves", turns), start=1), 20, 2.0, keep=1)
            finally:
                turns.end("saves")

        raised = at_once(goes_on, saves)
        assert raised[0] is None and found[0] in (10, 20), (places, raised)
        assert value_of(url, found[0]) == found[0] / 10, places
        assert ObjectStore(Objects(url)).steps()[-1] == found[0], places


def test_a_new_run_is_refused_where_there_are_saves(url: str) -> None:
    save(writer(url, begins=True), 10, 1.0)
    with pytest.raises(RunError, match=r"has saves of a run already \(to step 10\)"):
        writer(url, begins=True)


def test_only_the_newest_and_the_best_are_kept_and_nothing_else(url: str) -> None:
    store = writer(url, begins=True)
    for step in (10, 20, 30):
        store.write_part(step - 5, rank=0, pieces=[whole(0.0)], token="dead")  # comes to nothing
        store.put_report(step, b"{}", rank=1, token="ab")
        save(store, step, 1.0, keep=2)
    store.best = 20
    save(store, 40, 1.0, keep=1)
    assert store.steps() == [20, 40]
    later = writer(url)
    later.best = 20
    part = store.write_part(50, rank=0, pieces=[whole(1.0)], token="ab")  # of the one before
    with pytest.raises(StoreError, match="goes on with the run"):
        store.publish(50, parts=[part], state={}, keep=1, token="ab")
    save(later, 50, 2.0, keep=1)
    assert later.steps() == [20, 50]
    kept = {name for name in later.objects.sizes() if not name.startswith("start-")}
    parts = ("step-00000020.s1", "step-00000050.s2")
    assert kept == {f"{p}/{name}" for p in parts for name in (NAME, "rank-00000.ab.safetensors")}


def test_an_abandoned_save_gives_its_room_back(url: str) -> None:
    store = writer(url, begins=True)
    store.write_part(10, rank=0, pieces=[whole(0.0)], token="dead")
    store.abandon(10, token="dead")
    assert all(name.startswith("start-") for name in store.objects.sizes())


def test_a_save_that_is_not_whole_is_passed_over(url: str) -> None:
    store = writer(url, begins=True)
    save(store, 10, 1.0)
    save(store, 20, 2.0)
    (name,) = [n for n in store.objects.sizes() if "00020" in n and "rank" in n]
    store.objects.write(name, [b"short"])
    told: list[str] = []
    again = ObjectStore(Objects(url))
    assert again.claim(by="x", begins=False, on_bad=told.append) == 10
    assert "expected 108 bytes, got 5 bytes" in told[0] or "got 5 bytes" in told[0]
    assert again.steps() == [10], "the start that goes on does not name it"


def test_other_bytes_are_found_before_they_are_read(url: str) -> None:
    store = writer(url, begins=True)
    save(store, 10, 1.0)
    save(store, 20, 2.0)
    (name,) = [n for n in store.objects.sizes() if "00020" in n and "rank" in n]
    content = bytearray(store.objects.read(name))
    content[-1] ^= 1
    store.objects.write(name, [bytes(content)])
    told: list[tuple[int, str]] = []
    again = ObjectStore(Objects(url))
    assert again.newest_good(on_bad=lambda step, why: told.append((step, why))) == 10
    ((step, why),) = told
    assert step == 20 and why == f"{url}/{name}: damaged (its hash does not match the manifest)"
    store.objects.write(name, [bytes(content), b"more than was said"])
    with pytest.raises(CheckpointError, match="expected"):
        again.open(20)


class Failing(Objects):
    """Fails before operation number `at` (`after`: once that is done): a store that goes away."""

    def __init__(self, url: str, *, at: int, after: bool = False) -> None:
        super().__init__(url)
        self.count, self._at, self._after = 0, at, after

    def create(self, name: str, content: bytes) -> None:
        self._do(lambda: super(Failing, self).create(name, content))

    def sizes(self) -> dict[str, int]:
        return self._do(super().sizes)

    def write(self, name: str, parts: object) -> tuple[int, str]:
        return self._do(lambda: super(Failing, self).write(name, parts))

    def remove(self, names: object) -> None:
        self._do(lambda: super(Failing, self).remove(names))

    def _do(self, call):  # type: ignore[no-untyped-def]
        here, self.count = self.count, self.count + 1
        if here == self._at and not self._after:
            raise StoreError("away", away=True)
        found = call()
        if here == self._at:
            raise StoreError("the answer was lost", away=True)
        return found


@pytest.mark.parametrize("after", [False, True])
def test_a_save_that_fails_anywhere_leaves_the_one_before(url: str, after: bool) -> None:
    """And the next one removes what it has left; an answer that is lost loses no save."""
    first = writer(url, begins=True)
    save(first, 10, 1.0, keep=1)
    clean = Failing(url, at=-1)
    save(ObjectStore(clean, start=1), 20, 2.0, keep=2)
    assert clean.count > 4
    for at in range(clean.count):
        step = 30 + at
        store = ObjectStore(Failing(url, at=at, after=after), start=1)
        before = ObjectStore(Objects(url)).steps()
        try:
            save(store, step, float(step), keep=2)
        except StoreError:
            assert ObjectStore(Objects(url)).steps() == before
        else:
            assert ObjectStore(Objects(url)).steps()[-1] == step
        newest = ObjectStore(Objects(url)).steps()[-1]
        assert value_of(url, newest) == (2.0 if newest == 20 else newest)
    save(first, 99, 9.0, keep=1)
    names = {name for name in first.objects.sizes() if not name.startswith("start-")}
    assert names == {f"step-00000099.s1/{name}" for name in (NAME, "rank-00000.ab.safetensors")}


def test_a_store_that_is_away_is_not_a_damaged_save(url: str) -> None:
    """Else an older save would be taken, and the newer one thrown away."""
    store = writer(url, begins=True)
    save(store, 10, 1.0)
    save(store, 20, 2.0)
    away = ObjectStore(Objects(url))

    def read(name: str, **known: int) -> bytes:
        raise StoreError("away")

    away.objects.read = read  # type: ignore[method-assign]
    with pytest.raises(RunError, match="away"):
        away.newest_good(on_bad=lambda step, why: pytest.fail(why))
    with pytest.raises(RunError, match="away"):
        away.open(20)


def test_a_start_record_of_anything_else_is_refused(url: str) -> None:
    objects = Objects(url)
    objects.create("start-00000001.saves.json", b'{"number": "many"}')
    with pytest.raises(StoreError, match="cannot be understood"):
        ObjectStore(objects).steps()
    assert Start().number == 0
