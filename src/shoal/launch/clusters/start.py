"""What every scheduler starts on each host: an agent, and on the first one the coordinator too."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import UserError


@dataclass(frozen=True)
class Start:
    """A run as a scheduler is to start it. Paths are those that its hosts see."""

    recipe: str
    overrides: Sequence[str]
    out: Path
    num_hosts: int
    keys: Path
    port: int

    def __post_init__(self) -> None:
        """Raises UserError for a number of hosts that is none."""
        if self.num_hosts < 1:
            raise UserError(f"--num-hosts: expected 1 or more, got {self.num_hosts}")

    @property
    def agent(self) -> str:
        """The command of every host. It listens at all addresses; who has no secret is refused."""
        words = ["shoal", "agent", "--listen", "0.0.0.0", "--port", str(self.port), "--once"]
        return shlex.join([*words, "--keys", str(self.keys)])

    def coordinator(self, hosts: str) -> str:
        """The command of the first host; `hosts`: the file with all of them."""
        words = ["shoal", "launch", "hosts", self.recipe, *self.overrides, "--out", str(self.out)]
        return shlex.join([*words, "--keys", str(self.keys), "--hosts", hosts, "--go-on"])

    def on_every_host(self, is_first: str, *, hosts: str) -> str:
        """Both, for a shell; `is_first`: a condition of it. The exit status is that of the run."""
        return "\n".join(
            [
                f"{self.agent} & agent=$!",
                "trap 'kill -TERM $agent' TERM INT",
                f"if {is_first}; then",
                f"  {self.coordinator(hosts)} & run=$!",
                f"  {waits('run')}",
                "  kill -TERM $agent 2>/dev/null; wait; exit $status",
                "fi",
                waits("agent"),
                "exit $status",
            ]
        )


def waits(name: str) -> str:
    """Shell that waits for a process by the name of its variable, also over signals."""
    again = f"while kill -0 ${name} 2>/dev/null; do wait ${name}; status=$?; done"
    return f"wait ${name}; status=$?; {again}"
