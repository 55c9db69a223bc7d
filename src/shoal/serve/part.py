"""A part of a model that is served: one rank of the tensor axis, and sums in a fixed order.

A layer whose outputs are cut gives each rank its own columns; one whose inputs are cut gives a part
of a sum. Those sums are added in a fixed number of pieces and in their order, however many ranks
hold the pieces, so an answer has the same bits under every degree that divides that number.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shoal.comm.threads import Meeting
from shoal.errors import ModelError
from shoal.legal import facts_from_config
from shoal.models.anatomy import Anatomy, anatomy_of, check_logits
from shoal.models.families.tensor import tensor_table
from shoal.models.placement import has_vocabulary_head, mixtures_of, regions_of, row_layers_of
from shoal.parallel.local import Holding
from shoal.parallel.tensor import check_degree, cut_parameters, segments_of
from shoal.serve.exact import LANES, Report, keeps_columns


class Part:
    """Which part of a model a runner holds: that of `rank` of `degree`; its sums are in `pieces`.

    `meeting`: of the ranks, which are threads.
    """

    def __init__(
        self, *, pieces: int = 1, rank: int = 0, degree: int = 1, meeting: Meeting | None = None
    ) -> None:
        self.rank, self.degree, self.pieces, self._meeting = rank, degree, pieces, meeting
        self._turn = 0
        self.sums: tuple[nn.Module, ...] = ()
        """Layers that give parts of sums."""
        self.head_is_cut = False
        self.is_cut = False
        self._in_lanes = True

    @property
    def own_pieces(self) -> int:
        """Pieces of every sum that this rank computes."""
        return self.pieces // self.degree

    def cut(self, model: nn.Module) -> None:
        """Leave this part of `model`, in place. Raises ModelError for one that cannot be cut so."""
        anatomy, self.is_cut = check_logits(model, anatomy_of(model)), True
        if self.pieces == 1:
            return
        if mixtures_of(model):
            raise ModelError(
                f"{type(model).__name__}: a mixture of experts is served whole\n"
                "    leave serve.tensor and serve.pieces at 1"
            )
        check_degree(model, anatomy, self.pieces)
        self._in_lanes = self._keeps_lanes(model, anatomy)
        if self.degree > 1:
            self._cut(model, anatomy)
        paths = row_layers_of(model, base=anatomy.base)
        self.sums = tuple(model.get_submodule(path) for path in paths)

    def _keeps_lanes(self, model: nn.Module, anatomy: Anatomy) -> bool:
        """Whether no loop over one of several inner parts of a row leaves values over.

        What is left over is computed by other code (serve/exact.py), so an activation of a fused
        gate has other bits where its width is no multiple.
        """
        config: Any = model.config
        inner = facts_from_config(config.to_dict()).feed_forward
        fused = any(inner in placement.pieces for placement in anatomy.placements.values())
        return not fused or inner // self.pieces % LANES == 0

    def _cut(self, model: nn.Module, anatomy: Anatomy) -> None:
        cuts = {}
        for name, placement in anatomy.placements.items():
            shape = tuple(model.get_parameter(name).shape)
            inside = placement.style in ("column", "row")
            own = segments_of(placement, shape, rank=self.rank, degree=self.degree)
            cuts[name] = Holding(shape, own if inside else ())
        cut_parameters(model, cuts)
        table = tensor_table(model.config)
        assert table is not None, "check_degree has passed"
        for path in regions_of(model, base=anatomy.base):
            table.localise(model.get_submodule(path), self.degree)
        self.head_is_cut = has_vocabulary_head(model)
        if self.head_is_cut:
            self._cut_head(model.get_output_embeddings())  # type: ignore[operator]

    def _cut_head(self, head: Any) -> None:
        """Leave the head's outputs for some of the vocabulary; the embedding stays whole."""
        entries = head.out_features
        own = slice(entries * self.rank // self.degree, entries * (self.rank + 1) // self.degree)
        for name in ("weight", "bias"):
            whole = getattr(head, name)
            if whole is not None:
                setattr(head, name, nn.Parameter(whole.data[own].clone(), requires_grad=False))
        head.out_features = own.stop - own.start

    def all_of(self, own: list[Tensor]) -> list[Tensor]:
        """Every rank's pieces of a sum, in order. Raises WorkerError where a rank has failed."""
        if self._meeting is None:
            return own
        # new tensors that nobody changes, in slots used in turn: to meet once is enough
        slots, self._turn = self._meeting.slots[self._turn], 1 - self._turn
        slots[self.rank] = own
        self._meeting.wait()
        return [each for theirs in list(slots) for each in theirs]

    def keeps_columns(self, report: Report) -> bool:
        """Whether outputs were seen to keep their bits in products of as many as any degree has."""
        if not self._in_lanes:
            return False
        degrees = [degree for degree in range(1, self.pieces + 1) if self.pieces % degree == 0]
        widths: dict[int, set[int]] = {}
        for outputs, inputs in report.ways:
            whole = outputs * self.degree
            widths.setdefault(inputs, set()).update(-(-whole // degree) for degree in degrees)
        return all(
            keeps_columns(each, inputs=inputs, dtype=report.dtype)
            for inputs, each in widths.items()
        )
