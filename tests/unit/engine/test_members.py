"""A rank whose epoch lost another one leaves the step at its next pass, not at the sum."""

from __future__ import annotations

import json
import socket
import time

import pytest
import torch

from shoal.comm.group import ProcessGroup
from shoal.engine.members import Epochs
from shoal.engine.orders import Orders
from shoal.errors import PeersLost
from shoal.observe.events import Report
from shoal.runtime import Place


def test_a_pass_is_not_begun_when_its_sum_cannot_complete() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        orders = Orders().listen(theirs.detach())
        group = ProcessGroup()
        epochs = Epochs(
            group,
            orders=orders,
            place=Place(0, 2, torch.device("cpu"), 1),
            report=Report(ours.fileno()),
            keys=None,
        )
        group.pulse.mark("forward", step=3)
        epochs.number = 4
        ours.sendall(json.dumps({"order": "lost", "number": 4}).encode() + b"\n")
        until = time.monotonic() + 10
        while orders.broken_epoch != 4 and time.monotonic() < until:
            time.sleep(0.01)
        for phase in ("forward", "backward"):
            with pytest.raises(PeersLost, match="epoch 4 lost a rank"):
                group.pulse.mark(phase)
        group.pulse.mark("commit", step=3)  # a step that was summed is still committed
        epochs.number = 5  # it has joined the next epoch
        group.pulse.mark("forward", step=4)
