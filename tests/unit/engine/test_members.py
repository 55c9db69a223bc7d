"""A rank whose generation lost another one leaves the step at its next pass, not at the sum."""

from __future__ import annotations

import json
import socket
import time

import pytest
import torch

from shoal.comm.group import ProcessGroup
from shoal.engine.membership.members import Generations
from shoal.engine.membership.orders import Orders
from shoal.errors import PeersLost
from shoal.observe.events import Report
from shoal.runtime import WorkerInfo


def test_a_pass_is_not_begun_when_its_sum_cannot_complete() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        orders = Orders().listen(theirs.detach())
        group = ProcessGroup()
        generations = Generations(
            group,
            orders=orders,
            worker=WorkerInfo(0, 2, torch.device("cpu"), 1),
            report=Report(ours.fileno()),
            keys=None,
        )
        generations.number = 4
        ours.sendall(json.dumps({"order": "lost", "number": 4}).encode() + b"\n")
        until = time.monotonic() + 10
        while orders.broken_generation != 4 and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(PeersLost, match="generation 4 lost a rank"):
            generations.check()
        generations.number = 5  # it has joined the next generation
        assert generations.check() is None
