"""Models whose answer is one row of numbers for a text: classes, a score, an embedding.

Each text is one forward by itself, so its numbers depend on no other text. (Encoders see a whole
text at once, so there is nothing that a cache could keep.)

Shapes: T tokens, D hidden size, C classes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.errors import ModelError, UserError
from shoal.serve.exact import Report, make_exact
from shoal.serve.fuse import fuse_norms
from shoal.serve.reading import kind_of, read_model
from shoal.serve.request import Counters, Event, Request


class Pooled:
    """Requests in order, one forward each; stands where the engine does."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: str,
        exact: bool,
        int8: bool,
        device: torch.device | None = None,
    ) -> None:
        """`device`: None is the CPU. Raises ModelError for a folder that cannot be read."""
        self._kind = kind_of(folder)
        classes = self._kind == "classify"
        name = "AutoModelForSequenceClassification" if classes else "AutoModel"
        self.model = read_model(folder, auto_class=name, kernel="shoal")
        self._device = device or torch.device("cpu")
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.model.to(self._device, dtype)
        self.report: Report | None = None
        if exact or int8:
            self.report = make_exact(self.model, release=True, int8=int8)
            fuse_norms(self.model)
        config: Any = self.model.config.get_text_config()
        self._vocabulary: int = config.vocab_size
        first = config.pad_token_id + 1 if _counts_from_padding(config) else 0
        self.most_tokens: int = getattr(config, "max_position_embeddings", 1 << 20) - first
        self._pooling = "none" if classes else _pooling_of(folder)
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self.counters = Counters()
        self.num_running = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_free(self) -> int:
        """Blocks of a cache: there is none."""
        return 0

    def facts(self) -> dict[str, Any]:
        """What clients and the server must know."""
        return {
            "kind": self._kind,
            "context": self.most_tokens,
            "vocabulary": self._vocabulary,
            "blocks": 0,
            "exact": self.report is not None and self.report.proven,
            "products": str(self.report) if self.report else "not exact, as asked",
        }

    def submit(self, request: Request) -> None:
        """Queue a request. Raises UserError for one that can never be served."""
        length = len(request.prompt)
        if not request.pooled:
            raise UserError("this model makes no text; it gives each text classes or an embedding")
        if not 0 < length <= self.most_tokens:
            raise UserError(
                f"a text has 1 to {self.most_tokens} tokens here, and this one {length}; shorten it"
            )
        wrong = [token for token in request.prompt if not 0 <= token < self._vocabulary]
        if wrong:
            raise UserError(f"token {wrong[0]} is not one of the model's {self._vocabulary}")
        if request.id in self._waiting:
            raise UserError(f"request {request.id!r} is being served already")
        self._waiting[request.id] = request

    def cancel(self, name: str) -> None:
        """Forget a request. One that is gone needs nothing."""
        self._waiting.pop(name, None)

    def step(self) -> list[Event]:
        """One text."""
        if not self._waiting:
            return []
        name, request = self._waiting.popitem(last=False)
        values = self._values(request)
        self.counters.steps += 1
        self.counters.prompt_tokens += len(request.prompt)
        return [Event(id=name, hidden=tuple(values.float().tolist()), finish="stop")]

    @torch.no_grad()
    def _values(self, request: Request) -> Tensor:
        inputs = {"input_ids": torch.tensor([request.prompt], device=self._device)}
        if request.types:
            inputs["token_type_ids"] = torch.tensor([request.types], device=self._device)
        output = self.model(**inputs)
        if self._kind == "classify":
            logits: Tensor = output.logits[0]
            return logits
        hidden: Tensor = output.last_hidden_state[0]
        return {"mean": hidden.mean(dim=0), "cls": hidden[0], "lasttoken": hidden[-1]}[
            self._pooling
        ]


def _counts_from_padding(config: Any) -> bool:
    """RoBERTa's kind of positions: the first token's is that of padding and one more."""
    return "roberta" in config.model_type and config.pad_token_id is not None


def _pooling_of(folder: Path) -> str:
    """How states become one, as sentence-transformers stores it; the mean where it does not."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        chosen = [
            key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for key, value in said.items()
            if key.startswith("pooling_mode_") and value is True
        ]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from None
    if len(chosen) != 1 or chosen[0] not in ("mean", "cls", "lasttoken"):
        known = "mean_tokens, cls_token and lasttoken are known"
        raise ModelError(f"{file}: pooling by {', '.join(chosen) or 'nothing'}: {known}")
    return chosen[0]
