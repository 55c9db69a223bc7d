"""What workers of tests compute with the kernels of the context axis: rank by rank, on a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoal.models.kernels import MaskRequest
from shoal.observe.events import Report
from shoal.parallel import ring
from shoal.parallel.exchange import Exchange
from shoal.parallel.rows import Context
from shoal.runtime import start_process_group, stop_process_group

Tensors = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def made(case: dict[str, Any]) -> Tensors:
    """Whole queries [B, H, T, D], keys, values and the gradient of the output, in float64."""
    generator = torch.Generator().manual_seed(0)
    rows, tokens, size = case["rows"], case["tokens"], case["size"]
    shapes = {
        "query": (rows, case["heads"], tokens, size),
        "key": (rows, case["groups"], tokens, size),
        "value": (rows, case["groups"], tokens, case["value_size"]),
        "gradient": (rows, tokens, case["heads"], case["value_size"]),
    }
    found = {n: torch.randn(s, generator=generator).double() for n, s in shapes.items()}
    return {name: 2.0 * each if name in ("query", "key") else each for name, each in found.items()}


def documents(case: dict[str, Any]) -> Tensor | None:
    """int32 [B, T]: documents of uneven length, other ones in each row, padding behind the last."""
    if not case["documents"]:
        return None
    generator = torch.Generator().manual_seed(1)
    begins = torch.rand(case["rows"], case["tokens"], generator=generator) < 0.08
    ids = begins.int().cumsum(1, dtype=torch.int32)
    ids[0, -case["tokens"] // 8 :] = -1
    return ids


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker: says how far its part is from attention on whole rows."""
    report = Report(descriptor)
    rank, case = payload["rank"], payload["case"]
    meeting = f"file://{payload['meeting']}"
    start_process_group(
        rank=rank,
        size=payload["size"],
        device=torch.device("cpu"),
        meeting=meeting,
        timeout_seconds=60,
    )
    ring._BLOCK_BYTES["cpu"] = case["block_bytes"]
    events = watched()
    group = torch.distributed.group.WORLD
    exchange = Exchange(group, rank=rank, size=payload["size"])
    context = Context(exchange, case["kind"])
    found = computed(context, case)
    wanted = reference(case)
    places = context._places(rank, tokens=case["tokens"])
    apart = {}
    for name, each in found.items():
        dim = 1 if name == "output" else 2
        whole = wanted[name].index_select(dim, places)
        scale = float(wanted[name].abs().max())
        apart[name] = float((each.double() - whole).abs().max()) / scale
    sent = dict(exchange.traffic.sent_bytes)
    report.say("found", found={"apart": apart, "sent": sent, "events": events})
    stop_process_group()
    return 0


def watched() -> list[str]:
    """What a ring does from now on, in order: `send`, `compute` (a hop's blocks), `wait`."""
    events: list[str] = []
    send, compute, wait = ring.Ring.pass_on, ring.Ring.blocks, ring._Passing.wait

    def noted(word: str, call: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            events.append(word)
            return call(*arguments, **named)

        return run

    ring.Ring.pass_on = noted("send", send)  # type: ignore[method-assign]
    ring.Ring.blocks = noted("compute", compute)  # type: ignore[method-assign]
    ring._Passing.wait = noted("wait", wait)  # type: ignore[method-assign]
    return events


def computed(context: Context, case: dict[str, Any]) -> Tensors:
    """Output and gradients of this rank's part, by the kernel."""
    dtype, places = (
        DTYPES[case["dtype"]],
        context._places(context.exchange.rank, tokens=case["tokens"]),
    )
    whole = {name: each.to(dtype) for name, each in made(case).items()}
    names = ("query", "key", "value")
    own = [whole[name].index_select(2, places).requires_grad_() for name in names]
    ids = documents(case)
    request = MaskRequest(
        batch_size=case["rows"],
        num_queries=len(places),
        num_keys=len(places),
        allowed=lambda *_: True,
        window=case["window"],
        document_ids=None if ids is None else ids[:, places],
        row_document_ids=ids,
    )
    kernel: Any = context.kernel
    output = kernel(
        *own,
        layer=0,
        mask=kernel.mask(request),
        causal=True,
        scale=case["scale"],
        softcap=case["softcap"],
        bias=None,
    )
    output.backward(whole["gradient"].index_select(1, places))
    grads = {name: each.grad for name, each in zip(names, own, strict=True)}
    return {"output": output.detach(), **grads}


def reference(case: dict[str, Any]) -> Tensors:
    """The same of whole rows in float64, by torch's own attention or, with a cap, its formula."""
    whole = {name: each.to(DTYPES[case["dtype"]]).double() for name, each in made(case).items()}
    own = [whole[name].requires_grad_() for name in ("query", "key", "value")]
    share = case["heads"] // case["groups"]
    query, key, value = own[0], *(each.repeat_interleave(share, 1) for each in own[1:])
    places = torch.arange(case["tokens"])
    behind = places[:, None] - places
    mask = (behind >= 0)[None, None]
    if case["window"] is not None:
        mask = mask & (behind < case["window"])
    ids = documents(case)
    if ids is not None:
        mask = mask & (ids[:, None, :, None] == ids[:, None, None, :])
    if case["softcap"] is None:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=case["scale"]
        )
    else:
        scores = query @ key.transpose(2, 3) * case["scale"]
        scores = (scores / case["softcap"]).tanh() * case["softcap"]
        output = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    output = output.transpose(1, 2)
    output.backward(whole["gradient"])
    grads = dict(zip(("query", "key", "value"), (each.grad for each in own), strict=True))
    return {"output": output.detach(), **grads}
