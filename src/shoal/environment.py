"""The only reader of environment variables. A value set in the recipe wins over one set here."""

from __future__ import annotations

import fcntl
import os
import platform
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import UserError


def cache_directory() -> Path:
    """Folder for fetched packages, tokenizers and token files. `SHOAL_CACHE` moves it."""
    own = os.environ.get("SHOAL_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "shoal"


def language_wanted() -> str:
    """The language of the user's locale (LC_ALL, LC_MESSAGES, LANG): zh_CN for any Chinese, or en.

    Of these variables the first that is set counts.
    """
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    locale = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return "zh_CN" if locale.lower().startswith("zh") else "en"


def python_path() -> list[str]:
    """Folders that the user has told Python to import from, as PYTHONPATH has them."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(each) for each in given if each]


def hub_is_offline() -> bool:
    """Whether the user has forbidden hub access (`HF_HUB_OFFLINE=1`)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


@dataclass(frozen=True)
class Rendezvous:
    """What torchrun, or `shoal run`, tells a worker it has started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    meeting: str | None = None
    """Where the workers of `shoal run` meet: a URL; None: at torchrun's addresses."""


def torchrun_rendezvous() -> Rendezvous | None:
    """This process's place under torchrun, or None when torchrun did not start it.

    Raises UserError for variables that cannot all be true: such a worker would train alone.
    """
    given = [name for name in _TORCHRUN[:2] if name in os.environ]
    if not given:
        return None
    if len(given) == 1:
        raise UserError(
            f"{given[0]} is set, of RANK and WORLD_SIZE: expected both, or none\n"
            f"    unset {given[0]}; a worker that does not know of the others would train alone"
        )
    rank, size = _count("RANK", 0), _count("WORLD_SIZE", 1)
    local_rank, local_size = _count("LOCAL_RANK", rank), _count("LOCAL_WORLD_SIZE", size)
    told = ", ".join(f"{name}={os.environ[name]}" for name in _TORCHRUN if name in os.environ)
    if not (rank < size and local_rank < local_size <= size):
        raise UserError(
            f"{told}: expected RANK below WORLD_SIZE, and LOCAL_RANK below LOCAL_WORLD_SIZE, which "
            "is WORLD_SIZE at most\n    unset what another engine or a shell has left"
        )
    count = _copies()
    if count is not None and count[1] > size:
        raise UserError(
            f"{count[0]}={count[1]} and {told}: {count[1]} copies were started of what is one of "
            f"{size}, and each would train alone\n    start torchrun once on each host, with "
            "--nnodes and a --rdzv-endpoint, or let the scheduler start agents: shoal launch"
        )
    meeting = os.environ.get("SHOAL_MEETING")
    return Rendezvous(rank, size, local_rank, local_size, meeting)


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def _count(name: str, default: int) -> int:
    """A variable that holds a number. Raises UserError for one that does not."""
    found = os.environ.get(name, str(default))
    if not found.isdigit():
        raise UserError(
            f"{name}: expected a number, as torchrun sets it, got {found!r}\n    unset it"
        )
    return int(found)


def _copies() -> tuple[str, int] | None:
    """The variable by which a scheduler says that it has started several of this, and how many."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            return name, int(count)
    return None


def started_together() -> tuple[str, int] | None:
    """The variable by which a scheduler says that it has started this command several times.

    None where it was started once, or by torchrun, whose workers find each other.
    """
    return None if torchrun_rendezvous() is not None else _copies()


def become_worker(rank: int, *, size: int, meeting: str) -> None:
    """Stand where `torchrun_rendezvous` finds it: one of `size` workers on this host."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
    os.environ["SHOAL_MEETING"] = meeting


def worker_environment(*, threads: int) -> dict[str, str]:
    """The environment to exec a worker with: this one, its thread count, and no spinning."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "0",
        "OMP_WAIT_POLICY": "passive",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def noted_settings() -> dict[str, str]:
    """Variables that change how torch runs, as far as they are set."""
    names = ("TORCH_DISTRIBUTED_DEBUG", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names if name in os.environ}


_chosen: list[str] = []
"""The interface that we have named, not the user."""


def talk_over(address: str) -> None:
    """Make gloo use the interface that has `address`, unless the user named one.

    Without a name gloo asks which address the host name has, which fails or hangs on machines
    whose name no one can resolve, and is loopback on many others.
    """
    name = "lo" if address.startswith("127.") else _interface_of(address)
    if sys.platform == "linux" and os.environ.get("GLOO_SOCKET_IFNAME") in (None, *_chosen):
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            _chosen[:] = [name]


def address_towards(host: str) -> str:
    """This host's own address as `host` sees it: the kernel's choice of a route; nothing is sent.

    Raises OSError where there is none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((host, 9))
        return str(asked.getsockname()[0])


_SIOCGIFADDR = 0x8915  # linux/sockios.h


def _interface_of(address: str) -> str | None:
    """The name of the interface that has an address (IPv4, Linux)."""
    wanted = socket.inet_aton(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                said = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("16s16x", name.encode()))
                if said[20:24] == wanted:
                    return name
    return None


def environment_of_others() -> dict[str, str]:
    """What a program with an environment of its own is started with: nothing leads it to ours."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: text for name, text in os.environ.items() if name not in ours}


AGENT_PORT = 27465
"""Where the agent of a host listens unless told otherwise."""


def secret_file() -> Path | None:
    """The file with the secret of a run over several hosts (`SHOAL_KEYS`)."""
    given = os.environ.get("SHOAL_KEYS")
    return Path(given).expanduser() if given else None


def usable_cores() -> int:
    """Cores this process may run on (affinity and container limits respected where known)."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    limit = _core_limit(Path("/sys/fs/cgroup"))
    return cores if limit is None else min(cores, limit)


def _core_limit(groups: Path) -> int | None:
    """Whole cores that the control groups mounted at `groups` (version 2 or 1) allow."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((groups / name).read_text() for name in names).split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):  # not this version, or "max"
            continue
        return max(1, quota // period) if quota > 0 and period > 0 else None
    return None


def machine_name() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_memory_bytes() -> int | None:
    """Memory that new processes can have: free or reclaimable, and within this process's control
    group. None where the system does not say (other than Linux)."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            most = Path(limit).read_text().strip()
            if most != "max":
                free = min(free, max(0, int(most) - int(Path(used).read_text())))
        except OSError:
            continue
    return free


def usable_memory_bytes() -> int | None:
    """Memory of this machine, or of the container it is limited to; None where unknown."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file():
        text = limit.read_text().strip()
        if text.isdigit():
            whole = min(whole, int(text))
    return whole
