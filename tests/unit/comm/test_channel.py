"""The channel between workers: what arrives is what was given, or is refused with the reason.

Real sockets, keys, processes and kills; a forged header is sent by a donor that really serves it.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from shoal.comm import channel
from shoal.comm.channel import CHUNK_BYTES, Donor, fetch
from shoal.comm.keys import Keys
from shoal.comm.wire import Answer, Header, Request, TensorHead
from shoal.errors import ChannelError
from shoal.observe.memory import private_bytes

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("attempt") / "keys")


def state() -> dict[str, torch.Tensor]:
    """Every dtype and odd shapes: none, several chunks, exactly one, a transposed one."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = {str(dtype): (100 * draw(3, 5)).to(dtype) for dtype in DTYPES}
    return {
        **tensors,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "large": draw(3 * CHUNK_BYTES // 4 + 7),
        "one chunk": draw(CHUNK_BYTES // 4),
        "turned": draw(6, 4).T,
        "nan": torch.tensor([float("nan"), float("inf")]),
    }


@pytest.fixture
def donor(keys: Keys) -> Iterator[Donor]:
    with Donor(state(), keys=keys, generation=3, facts={"step": 7, "who": ["replica", 1]}) as found:
        yield found


def get(
    donor: Donor, keys: Keys, *, generation: int = 3, **more: object
) -> dict[str, torch.Tensor]:
    found, facts = fetch(donor.address, keys=keys, generation=generation, timeout_seconds=5, **more)  # type: ignore[arg-type]
    assert facts == {"step": 7, "who": ["replica", 1]}
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        raw = lambda t: t.contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
        assert torch.equal(raw(found[name]), raw(tensor)), name


def test_every_dtype_and_shape_arrives(donor: Donor, keys: Keys) -> None:
    assert_same(get(donor, keys), state())
    assert donor.num_refused == 0


def test_it_fills_what_is_there(donor: Donor, keys: Keys) -> None:
    mine = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    places = {name: tensor.data_ptr() for name, tensor in mine.items()}
    assert_same(get(donor, keys, into=mine), state())
    assert_same(mine, state())
    assert {name: tensor.data_ptr() for name, tensor in mine.items()} == places


def test_many_receivers_one_after_another_and_at_once(donor: Donor, keys: Keys) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: get(donor, keys), range(8)):
            assert_same(found, state())


def test_it_listens_on_loopback_only(donor: Donor) -> None:
    assert donor.address.startswith("tcp://127.0.0.1:")


# --- who may talk


def test_a_receiver_with_other_keys_is_refused(donor: Donor, keys: Keys, tmp_path: Path) -> None:
    other = Keys.make(tmp_path / "keys")
    strangers = [other, Keys(keys.donor, other.receiver), Keys(other.donor, keys.receiver)]
    for count, stranger in enumerate(strangers, 1):
        began = time.monotonic()
        with pytest.raises(ChannelError, match=r"key|went away|nobody answers"):
            get(donor, stranger)
        assert time.monotonic() - began < 2, "refused, not waited for"
        wait_for_refusals(donor, count)
    assert_same(get(donor, keys), state())


def test_a_receiver_refused_before_it_asks_is_told_so(
    donor: Donor, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeroMQ takes a message for a peer that is gone by blocking, for ever."""
    connect = channel._Line.connect

    def connect_and_dawdle(line: channel._Line, address: str) -> None:
        connect(line, address)
        wait_for_refusals(donor, 1)
        time.sleep(0.3)

    monkeypatch.setattr(channel._Line, "connect", connect_and_dawdle)
    with pytest.raises(ChannelError, match="does not accept this worker's key"):
        get(donor, Keys.make(tmp_path / "keys"))


def test_a_receiver_of_another_generation_is_refused(donor: Donor, keys: Keys) -> None:
    for generation in (2, 4):
        with pytest.raises(
            ChannelError, match=f"asked for generation {generation}, this donor is of generation 3"
        ):
            get(donor, keys, generation=generation)
    assert donor.num_refused == 2
    assert_same(get(donor, keys), state())


def test_keys_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "attempt/keys"
    made = Keys.make(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in sorted(folder.iterdir())] == [0o600] * 2
    assert Keys.read(folder) == made
    assert made.donor.secret.decode() not in repr(made)
    with pytest.raises(FileExistsError):
        Keys.make(folder)


@pytest.mark.parametrize("how", ["file readable", "folder readable", "link", "cut", "gone"])
def test_keys_that_others_could_know_are_refused(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "keys"
    Keys.make(folder)
    path = folder / "donor.key"
    if how == "file readable":
        path.chmod(0o640)
    elif how == "folder readable":
        folder.chmod(0o750)
    elif how == "link":
        path.rename(folder / "elsewhere")
        path.symlink_to(folder / "elsewhere")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:60])
    else:
        path.unlink()
    with pytest.raises(ChannelError) as problem:
        Keys.read(folder)
    assert str(folder) in str(problem.value)


# --- a hostile peer


def wait_for_refusals(donor: Donor, count: int) -> None:
    deadline = time.monotonic() + 10
    while donor.num_refused < count:
        assert time.monotonic() < deadline, f"{donor.num_refused} refused, expected {count}"
        time.sleep(0.01)


def connection(donor: Donor) -> socket.socket:
    host, port = donor.address.removeprefix("tcp://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)
FOUR_GIGABYTES = struct.pack(">BQ", 6, 4 << 30)  # a long command frame


@pytest.mark.parametrize(
    "garbage",
    [
        os.urandom(4096),
        b"GET / HTTP/1.1\r\n\r\n" * 50,
        b"\x80\x04\x95" + bytes(100),  # the head of a pickle
        GREETING + FOUR_GIGABYTES + bytes(1 << 16),
        GREETING.replace(b"CURVE", b"NULL\0"),
        GREETING + struct.pack(">BB", 4, 200) + b"\x05HELLO" + bytes(194),
    ],
    ids=["random", "http", "pickle", "four gigabytes", "no security", "false hello"],
)
def test_garbage_is_refused_and_others_are_served(donor: Donor, keys: Keys, garbage: bytes) -> None:
    before = private_bytes()
    with connection(donor) as peer:
        try:
            peer.sendall(garbage)
        except OSError:  # it has hung up already
            pass
        assert_same(get(donor, keys), state())
        wait_for_refusals(donor, 1)
    assert (private_bytes() or 0) - (before or 0) < 64 << 20, "nothing was allocated for it"


def test_a_silent_connection_costs_nothing(donor: Donor, keys: Keys) -> None:
    peers = [connection(donor) for _ in range(50)]
    assert_same(get(donor, keys), state())
    for peer in peers:
        peer.close()


def ask(donor: Donor, keys: Keys, message: bytes) -> Answer:
    """What a peer with the right key gets for any bytes."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as line:
        line.linger = 0
        line.curve_serverkey = keys.donor.public
        line.curve_publickey, line.curve_secretkey = keys.receiver.public, keys.receiver.secret
        line.connect(donor.address)
        line.send(message)
        assert line.poll(5000), "no answer"
        return msgspec.msgpack.decode(line.recv_multipart()[0], type=Answer)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xc1\xff",
        msgspec.msgpack.encode({"generation": -1}),
        msgspec.msgpack.encode({"generation": 3, "tensor": 1, "chunk": 0, "more": 1}),
        msgspec.msgpack.encode(Request(3, 500)),
        msgspec.msgpack.encode(Request(3, 0, 1 << 40)),
        msgspec.msgpack.encode({"generation": 3, "tensor": 1, "chunk": -1}),
    ],
)
def test_requests_without_sense_are_answered_so(donor: Donor, keys: Keys, message: bytes) -> None:
    answer = ask(donor, keys, message)
    assert answer.problem == "not a request" or answer.problem.startswith("no chunk")
    assert donor.num_refused == 1
    assert_same(get(donor, keys), state())


# --- a donor that lies, changes, dies, or stops


def header(*heads: TensorHead, total: int | None = None, generation: int = 3) -> Header:
    return Header(generation, total if total is not None else 0, heads, "{}")


HASH = "0" * 16


@pytest.mark.parametrize(
    ("forged", "said"),
    [
        (header(TensorHead("a", "F32", (1 << 30,), HASH), total=1 << 32), "more than 1048576"),
        (header(TensorHead("a", "F32", (4,), HASH), total=15), "announces 15 bytes.*have 16"),
        (header(TensorHead("a", "F99", (4,), HASH), total=16), "dtype 'F99' is not one of"),
        (header(TensorHead("a", "U8", (0, 1 << 40, 1 << 40), HASH)), "no tensor has the shape"),
        (header(*[TensorHead("a", "U8", (1,), HASH)] * 2, total=2), "announces a name twice"),
        (header(generation=2), "expected a state of generation 3, got 2"),
        (header(TensorHead("", "U8", (1,), HASH), total=1), "header cannot be read"),
        (header(TensorHead("a", "U8", (1,) * 17, HASH), total=1), "header cannot be read"),
        (header(TensorHead("a", "U8", (-1,), HASH), total=1), "header cannot be read"),
        (header(TensorHead("a", "U8", (1,), "no hash"), total=1), "header cannot be read"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(
    donor: Donor, keys: Keys, forged: Header, said: str
) -> None:
    donor._header = msgspec.msgpack.encode(forged)
    with pytest.raises(ChannelError, match=said):
        fetch(donor.address, keys=keys, generation=3, timeout_seconds=5, most_bytes=1 << 20)
    assert donor.num_requests == 1, "only the header was asked for"


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        ({"a": torch.zeros(2)}, "only this worker has 'b'|only the donor has 'b'"),
        ({"a": torch.zeros(3), "b": torch.zeros(1)}, r"a is F32 \[2\], expected F32 \[3\]"),
        ({"a": torch.zeros(2).long(), "b": torch.zeros(1)}, r"a is F32 \[2\], expected I64 \[2\]"),
    ],
)
def test_another_state_than_mine_is_refused(
    keys: Keys, mine: dict[str, torch.Tensor], said: str
) -> None:
    donor = Donor({"a": torch.ones(2), "b": torch.ones(1)}, keys=keys, generation=0)
    with donor, pytest.raises(ChannelError, match=said):
        fetch(donor.address, keys=keys, generation=0, timeout_seconds=5, into=mine)
    assert all(float(tensor.sum()) == 0 for tensor in mine.values())


def test_what_changed_after_it_was_announced_is_not_used(keys: Keys) -> None:
    given = {"good": torch.ones(9), "bad": torch.ones(CHUNK_BYTES)}
    mine = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    with Donor(given, keys=keys, generation=0) as donor:
        given["bad"][CHUNK_BYTES - 1] = 1.0000001
        with pytest.raises(ChannelError, match="bad arrived with another hash than announced"):
            fetch(donor.address, keys=keys, generation=0, timeout_seconds=5, into=mine)
    assert all(float(tensor.sum()) == 0 for tensor in mine.values()), "all or nothing"


DONOR = """
import os, signal, sys, time
from pathlib import Path
import torch
from shoal.comm.channel import Donor
from shoal.comm.keys import Keys

class Dying(Donor):
    def _part(self, request):
        if self.num_requests == 5:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        return super()._part(request)

donor = Dying({"a": torch.ones(10_000_000)}, keys=Keys.read(Path(sys.argv[1])), generation=0)
print(donor.address, flush=True)
time.sleep(60)
"""


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("number", "said", "seconds"),
    [("SIGKILL", "the donor went away; ask another donor", 0.5), ("SIGSTOP", "no whole answer", 2)],
)
def test_a_donor_that_dies_or_stops_in_the_middle(
    tmp_path: Path, number: str, said: str, seconds: float
) -> None:
    keys = Keys.make(tmp_path / "keys")
    words = [sys.executable, "-c", DONOR, str(tmp_path / "keys"), number]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        mine = {"a": torch.zeros(10_000_000)}
        began = time.monotonic()
        with pytest.raises(ChannelError, match=said):
            fetch(address, keys=keys, generation=0, timeout_seconds=1, into=mine)
        assert time.monotonic() - began < seconds
        assert float(mine["a"].sum()) == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with pytest.raises(ChannelError, match="nobody answers there"):
        fetch(address, keys=keys, generation=0, timeout_seconds=5)


def test_a_closed_donor_answers_nobody(keys: Keys) -> None:
    donor = Donor({"a": torch.ones(2)}, keys=keys, generation=0)
    donor.close()
    with pytest.raises(ChannelError, match="nobody answers there"):
        fetch(donor.address, keys=keys, generation=0, timeout_seconds=5)


def test_an_address_that_is_none(keys: Keys) -> None:
    with pytest.raises(ChannelError, match="not an address of a donor"):
        fetch("nonsense", keys=keys, generation=0, timeout_seconds=1)


def test_what_cannot_be_sent_is_said_at_once(keys: Keys) -> None:
    with pytest.raises(ChannelError, match=r"z: dtype torch\.complex64 cannot be sent"):
        Donor({"z": torch.zeros(2, dtype=torch.complex64)}, keys=keys, generation=0)
    with pytest.raises(ChannelError, match="names and facts take"):
        Donor({}, keys=keys, generation=0, facts={"text": "x" * (17 << 20)})


def test_fifty_megabytes_take_a_fraction_of_a_second(keys: Keys) -> None:
    """Parameters and two moments of the quickstart's model; 0.11 s on two free cores."""
    given = {kind: torch.randn(4_200_000) for kind in ("parameter", "exp_avg", "exp_avg_sq")}
    mine = {name: torch.empty_like(tensor) for name, tensor in given.items()}
    took = []
    with Donor(given, keys=keys, generation=0) as donor:
        for _ in range(3):
            began = time.perf_counter()
            fetch(donor.address, keys=keys, generation=0, timeout_seconds=20, into=mine)
            took.append(time.perf_counter() - began)
    assert_same(mine, given)
    assert min(took) < 1.0, f"{took}: the bar is 0.3 s; thrice that is left for a busy machine"
