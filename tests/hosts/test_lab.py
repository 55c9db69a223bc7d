"""The hosts that other tests stand on: what they share, what they have alone, how they fail."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts.lab import Host, Lab, skewed, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))

LISTEN = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
print("ready", flush=True)
while True:
    end, _ = server.accept()
    while data := end.recv(65536):
        end.sendall(data[:16])
"""
ASK = """
import socket, sys, time
end = socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2]))
for number in range(int(sys.argv[3])):
    began = time.monotonic()
    end.sendall(b"x" * 16)
    assert end.recv(16)
    print(time.monotonic() - began, flush=True)
    time.sleep(0.05)
"""

BURN = """
import time
end = time.monotonic() + 2
while time.monotonic() < end:
    pass
print(time.process_time())
"""
CLOCKS = """
import time
print(time.time(), time.monotonic())
time.sleep(0.1)
print(time.monotonic())
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(3, tmp_path) as made:
        yield made


def listening(host: Host) -> subprocess.Popen[str]:
    process = host.start(sys.executable, "-c", LISTEN, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def reaches(one: Host, other: Host, *, times: int = 1) -> bool:
    asked = one.start(
        sys.executable,
        *("-c", ASK, other.name, "0.5", str(times)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return asked.wait() == 0


def test_each_has_its_own_and_they_can_be_cut_apart(lab: Lab) -> None:
    one, two, three = lab.hosts
    assert [each.run("hostname").strip() for each in lab.hosts] == ["h1", "h2", "h3"]
    one.run("touch", "/srv/mine", "/dev/shm/mine")
    assert two.run("ls", "/srv", "/dev/shm").split() == ["/dev/shm:", "/srv:"]
    assert one.run("sh", "-c", "ls -d /proc/[0-9]* | wc -l").strip() in ("3", "4")
    for each in lab.hosts:
        listening(each)
    assert reaches(one, two) and reaches(two, three)
    lab.cut(one, two)
    assert not reaches(one, two) and not reaches(two, one) and reaches(one, three)
    lab.heal()
    lab.cut_one_way(two, one)
    assert not reaches(one, two), "no answer comes back"
    lab.heal()
    lab.cut(three)
    assert not reaches(three, one) and reaches(one, two)
    lab.heal()
    assert reaches(three, one)


@pytest.mark.slow
def test_a_host_that_is_off_is_silent_and_one_that_is_killed_is_not(lab: Lab) -> None:
    one, two, three = lab.hosts
    ends = []
    for host, end in ((two, two.power_off), (three, three.kill)):
        host.run("sh", "-c", "echo kept > /srv/file")
        listening(host)
        asked = one.start(
            sys.executable,
            *("-c", ASK, host.name, "3", "100000"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert asked.stdout is not None and asked.stdout.readline()
        began = time.monotonic()
        end()
        _, error = asked.communicate(timeout=20)
        ends.append((time.monotonic() - began, error))
    (silence, off), (sudden, killed) = ends
    assert silence > 2.5 and "timed out" in off, "nothing tells of a pulled cable"
    assert sudden < 2 and "timed out" not in killed, "the kernel closes what a process leaves"
    two.boot()
    assert two.run("cat", "/srv/file") == "kept\n"
    listening(two)
    assert reaches(one, two)


@pytest.mark.slow
def test_cables_cores_and_clocks_are_as_asked(lab: Lab, tmp_path: Path) -> None:
    one, two, three = lab.hosts
    listening(two)
    lab.delay(two, 0.02)
    said = one.run(sys.executable, "-c", ASK, "h2", "5", "10").split()
    assert 0.038 < sorted(map(float, said))[5] < 0.3
    one.use_cores(0.25)
    assert float(one.run(sys.executable, "-c", BURN)) < 0.75
    words = three.run(sys.executable, "-c", CLOCKS, env=skewed(tmp_path, -600)).split()
    wall, before, after = map(float, words)
    assert -605 < wall - time.time() < -595 and 0.09 < after - before < 1


def test_nothing_is_left(tmp_path: Path) -> None:
    with Lab(1, tmp_path) as lab:
        spaces = [lab.switch, lab.hosts[0].space]
        pid = lab.hosts[0].pid
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert not any(each in left for each in spaces)
    assert not Path(f"/proc/{pid}").exists() and not Path(f"/etc/netns/{spaces[1]}").exists()
