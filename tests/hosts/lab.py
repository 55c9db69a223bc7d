"""Several hosts on this machine: own network, name, processes, /dev/shm and disk each (root only).

Hosts are namespaces of Linux, joined by a switch that is one more: it drops what a test tells it
to, without a word to either end, as a pulled cable does. All other folders are shared, as on a
cluster with shared storage; `/srv` is a host's own disk and outlives a power-off.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_CPU = Path("/sys/fs/cgroup/cpu")
_NETWORK = "10.77.0"
_BEGIN = (
    "hostname {name}; mount -t tmpfs shm /dev/shm; mount -t tmpfs run /run; "
    "mount --bind {disk} /srv; exec sleep infinity"
)
TOOLS = ("ip", "nft", "tc", "unshare", "nsenter")


@functools.cache
def why_not() -> str | None:
    """Why there can be no lab here; None: there can, as one that is made shows."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are namespaces, which only root can make"
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: iproute2 nftables util-linux)"
    try:
        with tempfile.TemporaryDirectory() as folder, Lab(1, Path(folder)) as lab:
            lab.hosts[0].run("true", timeout=10)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        return f"no hosts can be made here: {error}"
    return None


def call(*words: object, **more: Any) -> str:
    """A command that must do what it is for; what it printed."""
    done = subprocess.run([str(each) for each in words], capture_output=True, text=True, **more)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


class Host:
    """One of them, switched on."""

    def __init__(self, lab: Lab, number: int) -> None:
        self.lab, self.number = lab, number
        self.name, self.address = f"h{number}", f"{_NETWORK}.{number}"
        self.space, self.port = f"{lab.prefix}{self.name}", f"p{number}"
        self.disk = lab.folder / self.name
        self._group = _CPU / self.space
        self._first: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[str]] = []
        self.pid = 0

    def connect(self) -> None:
        """Give it a name, a network and a cable to the switch."""
        self.disk.mkdir(parents=True)
        call("ip", "netns", "add", self.space)
        call("ip", "-n", self.space, "link", "set", "lo", "up")
        pair = ("type", "veth", "peer", "name", "eth0", "netns", self.space)
        call("ip", "-n", self.lab.switch, "link", "add", self.port, *pair)
        call("ip", "-n", self.lab.switch, "link", "set", self.port, "master", "br0", "up")
        call("ip", "-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        call("ip", "-n", self.space, "link", "set", "eth0", "up")

    def boot(self) -> None:
        """Switch it on."""
        call("ip", "-n", self.lab.switch, "link", "set", self.port, "up")
        begin = _BEGIN.format(name=self.name, disk=self.disk)
        words = ["ip", "netns", "exec", self.space, "unshare", "--uts", "--mount", "--pid"]
        words += ["--fork", "--kill-child=KILL", "--mount-proc", "bash", "-c", begin]
        quiet = subprocess.DEVNULL
        self._first = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet)
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        for _ in range(500):
            found = children.read_text().split()
            if found and Path(f"/proc/{found[0]}/comm").read_text().strip() == "sleep":
                self.pid = int(found[0])
                break
            time.sleep(0.01)
        assert self.pid, f"{self.name} does not boot"
        if self._group.is_dir():
            (self._group / "cgroup.procs").write_text(str(self.pid))

    def start(
        self, *words: object, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[str]:
        """A process there, in the present folder."""
        spaces = ("--mount", "--uts", "--net", "--pid", f"--wdns={os.getcwd()}")
        command = ["nsenter", "-t", str(self.pid), *spaces, "--", *map(str, words)]
        group = self._group / "cgroup.procs" if self._group.is_dir() else None
        if group is not None:
            join = f'echo $$ > {group}; exec "$@"'
            command = ["bash", "-c", join, "bash", *command]
        process = subprocess.Popen(command, env={**os.environ, **(env or {})}, text=True, **more)
        self._started.append(process)
        return process

    def run(self, *words: object, timeout: float = 60.0, **more: Any) -> str:
        """A command there that must do what it is for; what it printed."""
        process = self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)
        said, error = process.communicate(timeout=timeout)
        assert process.returncode == 0, f"{self.name}: {words}: {error}"
        return said

    def kill(self) -> None:
        """Every process of it dies at once; others see their connections closed."""
        self._wake()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        if self._first is not None:
            self._first.wait()
        self._first, self.pid = None, 0

    def freeze(self) -> None:
        """Every process of it stops, until `thaw`."""
        self.run("bash", "-c", "kill -STOP -1")

    def thaw(self) -> None:
        """They go on."""
        self._wake()
        self.run("bash", "-c", "kill -CONT -1")

    def _wake(self) -> None:
        """nsenter stops with what it has started, and would not see it end."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)

    def power_off(self) -> None:
        """The cable first, so that the others see silence and nothing else."""
        call("ip", "-n", self.lab.switch, "link", "set", self.port, "down")
        time.sleep(0.05)
        self.kill()

    def use_cores(self, share: float) -> None:
        """At most so many cores from now on, for all that runs there."""
        assert _CPU.is_dir(), "control groups of version 1 have a folder for each resource"
        self._group.mkdir(exist_ok=True)
        (self._group / "cpu.cfs_period_us").write_text("100000")
        (self._group / "cpu.cfs_quota_us").write_text(str(int(share * 100_000)))
        for pid in call("ip", "netns", "pids", self.space).split():
            with contextlib.suppress(ProcessLookupError):
                (self._group / "cgroup.procs").write_text(pid)

    def rate(self, rate: str) -> None:
        """Of its cable in both directions, such as 100mbit."""
        shape = ("root", "tbf", "rate", rate, "burst", "256k", "latency", "100ms")
        call("tc", "-n", self.space, "qdisc", "replace", "dev", "eth0", *shape)
        call("tc", "-n", self.lab.switch, "qdisc", "replace", "dev", self.port, *shape)

    def remove(self) -> None:
        """What it was made of."""
        self.kill()
        for process in self._started:
            _end(process)
        subprocess.run(["ip", "netns", "del", self.space], capture_output=True)
        for _ in range(50):
            try:
                self._group.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.05)  # the kernel still counts those that have just died
            else:
                break


def sweep() -> None:
    """Remove what processes left that were killed in the middle of a lab."""
    for space in Path("/run/netns").glob("lab*x*"):
        maker = space.name.removeprefix("lab").partition("x")[0]
        if Path(f"/proc/{maker}").exists():
            continue
        for pid in call("ip", "netns", "pids", space.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", space.name], capture_output=True)
        shutil.rmtree(f"/etc/netns/{space.name}", ignore_errors=True)


class Lab:
    """`count` hosts h1, h2, ... at 10.77.0.1, .2, ... A context manager: leaving it ends them."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"lab{os.getpid()}x{secrets.token_hex(3)}"
        self.switch = f"{self.prefix}sw"
        self.hosts = [Host(self, number) for number in range(1, count + 1)]
        self._relays: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Lab:
        sweep()
        try:
            call("ip", "netns", "add", self.switch)
            call("ip", "-n", self.switch, "link", "set", "lo", "up")
            call("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
            call("ip", "-n", self.switch, "link", "set", "br0", "up")
            rules = "add table bridge lab; add chain bridge lab forward "
            self._nft(rules + "{ type filter hook forward priority 0; }")
            for host in self.hosts:
                self._name(host)
                host.connect()
                host.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything that was started, remove everything that was made."""
        for relay in self._relays:
            _end(relay)
        for host in self.hosts:
            host.remove()
            shutil.rmtree(f"/etc/netns/{host.space}", ignore_errors=True)
        subprocess.run(["ip", "netns", "del", self.switch], capture_output=True)

    def cut(self, one: Host, *others: Host) -> None:
        """Drop what goes between a host and `others`, both ways; none: the host and everybody."""
        if not others:
            self._drop(f"iifname {one.port}")
            self._drop(f"oifname {one.port}")
        for other in others:
            self.cut_one_way(one, other)
            self.cut_one_way(other, one)

    def cut_one_way(self, source: Host, target: Host) -> None:
        """Drop what goes from one host to the other; the way back stays."""
        self._drop(f"iifname {source.port} oifname {target.port}")

    def refuse(self, source: Host, target: Host, *, but: int) -> None:
        """Drop what opens a connection from one host to the other, at all ports `but` one."""
        ports = f"tcp flags & (syn|ack) == syn tcp dport != {but}"
        self._drop(f"iifname {source.port} oifname {target.port} {ports}")

    def lose(self, host: Host, share: float) -> None:
        """Drop this share of the frames that a host sends."""
        self._drop(f"iifname {host.port} numgen random mod 10000 < {int(share * 10_000)}")

    def heal(self) -> None:
        """Undo all cuts and losses."""
        self._nft("flush chain bridge lab forward")

    def delay(self, host: Host, seconds: float) -> None:
        """A frame from or to a host takes so long: by a relay in user space, without netem."""
        near, far, bridge = (f"{kind}{host.number}" for kind in ("da", "db", "bd"))
        inside = ("ip", "netns", "exec", self.switch)
        words = [*inside, sys.executable, str(_HERE / "slow_cable.py"), near, far, str(seconds)]
        relay = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self._relays.append(relay)
        assert relay.stdout is not None and relay.stdout.readline() == "ready\n"
        call("ip", "-n", self.switch, "link", "add", bridge, "type", "bridge")
        for port, master in ((host.port, bridge), (near, bridge), (far, "br0")):
            call("ip", "-n", self.switch, "link", "set", port, "master", master)
        for port in (bridge, near, far):
            call("ip", "-n", self.switch, "link", "set", port, "up")

    def _name(self, host: Host) -> None:
        folder = Path("/etc/netns") / host.space
        folder.mkdir(parents=True)
        (folder / "hostname").write_text(f"{host.name}\n")
        known = "".join(f"{each.address} {each.name}\n" for each in self.hosts)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}")

    def _drop(self, what: str) -> None:
        self._nft(f"add rule bridge lab forward {what} drop")

    def _nft(self, rules: str) -> None:
        call("ip", "netns", "exec", self.switch, "nft", rules)


def skewed(folder: Path, seconds: float) -> dict[str, str]:
    """Environment in which the wall clock is off by `seconds`; sleeps and monotonic clocks are
    right."""
    library = folder / "skewed_clock.so"
    if not library.exists():
        call("gcc", "-O2", "-shared", "-fPIC", "-o", library, _HERE / "skewed_clock.c", "-ldl")
    return {"LD_PRELOAD": str(library), "SKEW_SECONDS": str(seconds)}
