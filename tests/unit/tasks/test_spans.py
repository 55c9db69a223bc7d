import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.tasks.spans import precision_recall_f1, spans_of


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-X I-X O", [("X", 1, 3)]),
        ("B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
        ("I-X I-X O I-Y", [("X", 0, 2), ("Y", 3, 4)]),  # I- without B- opens a span
        ("B-X I-Y", [("X", 0, 1), ("Y", 1, 2)]),  # another type ends the one before
        ("B-geo-loc I-geo-loc", [("geo-loc", 0, 2)]),  # types may contain a dash
        ("", []),
        ("O O", []),
    ],
)
def test_spans_are_read_as_conlleval_does(tags: str, expected: list) -> None:
    assert spans_of(tags.split()) == expected


def _conlleval(tags: list[str]) -> list[tuple[str, int, int]]:
    """The rules of the CoNLL-2000 script written out: when a chunk ends, when one starts."""
    spans, start = [], None
    before, before_type = "O", ""
    for at, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        ends = before in "BI" and (prefix in "BO" or kind != before_type)
        starts = prefix == "B" or (prefix == "I" and (before == "O" or kind != before_type))
        if ends and start is not None:
            spans.append((before_type, start, at))
            start = None
        if starts:
            start = at
        before, before_type = prefix, kind
    return spans


_TAGS = st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), max_size=12)


@given(_TAGS)
def test_spans_agree_with_the_script(tags: list[str]) -> None:
    assert spans_of(tags) == _conlleval(tags)


@given(_TAGS)
def test_spans_are_disjoint_and_cover_every_tag(tags: list[str]) -> None:
    covered = [at for _, start, stop in spans_of(tags) for at in range(start, stop)]
    assert covered == [at for at, tag in enumerate(tags) if tag != "O"]


def test_scores_of_counts() -> None:
    assert precision_recall_f1(correct=1, predicted=2, gold=4) == (0.5, 0.25, pytest.approx(1 / 3))
    assert precision_recall_f1(correct=0, predicted=0, gold=0) == (0.0, 0.0, 0.0)
