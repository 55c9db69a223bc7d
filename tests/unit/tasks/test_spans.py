from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import DataError
from shoal.tasks.spans import as_bio2, is_reversed, precision_recall_f1, spans_of


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


def in_bio2(tags: list[str], *, behind: bool = False) -> list[str]:
    return [as_bio2(t, after=before, reversed_=behind) for before, t in pairwise(["O", *tags])]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # BIOES: the examples of seqeval's documentation for strict mode, and neighbours
        ("B-PER E-PER O S-LOC", "B-PER I-PER O B-LOC"),
        ("B-PER I-PER E-PER B-PER E-PER", "B-PER I-PER I-PER B-PER I-PER"),
        ("S-LOC S-LOC", "B-LOC B-LOC"),
        # BILOU
        ("B-PER I-PER L-PER U-LOC O", "B-PER I-PER I-PER B-LOC O"),
        ("U-LOC L-LOC", "B-LOC B-LOC"),  # an end with nothing open is an entity
        # BMES
        ("B-ORG M-ORG E-ORG S-PER", "B-ORG I-ORG I-ORG B-PER"),
        # IOB1: B- only where an entity follows another of its type
        ("I-PER I-PER B-PER O I-LOC", "B-PER I-PER B-PER O B-LOC"),
        ("I-PER I-LOC", "B-PER B-LOC"),
        # BIO2 as it is, types with dashes
        ("B-geo-loc I-geo-loc O B-per", "B-geo-loc I-geo-loc O B-per"),
    ],
)
def test_every_scheme_is_read_as_bio2(given: str, expected: str) -> None:
    assert is_reversed(given.split()) is False
    assert in_bio2(given.split()) == expected.split()
    behind = ["O" if t == "O" else "-".join([t[2:], t[0]]) for t in given.split()]
    assert is_reversed(behind) is True
    assert in_bio2(behind, behind=True) == expected.split()


def _written(spans: list[tuple[str, int, int]], *, length: int, letters: str) -> list[str]:
    """Spans in a scheme whose letters are (begins, inside, ends, alone), by its definition."""
    begins, inside, ends, alone = letters
    tags = ["O"] * length
    for kind, start, stop in spans:
        tags[start:stop] = [f"{inside}-{kind}"] * (stop - start)
        tags[stop - 1] = f"{ends}-{kind}"
        tags[start] = f"{alone if stop - start == 1 else begins}-{kind}"
    return tags


@given(_TAGS, st.sampled_from(["BIIB", "BIES", "BILU", "BMES"]))
def test_what_is_written_in_any_scheme_comes_back(tags: list[str], letters: str) -> None:
    spans = spans_of(tags)
    written = _written(spans, length=len(tags), letters=letters)
    assert in_bio2(written) == _written(spans, length=len(tags), letters="BIIB")
    assert spans_of(in_bio2(written)) == spans


@given(_TAGS)
def test_bio_and_iob1_keep_their_spans(tags: list[str]) -> None:
    assert spans_of(in_bio2(tags)) == spans_of(tags) == _conlleval(tags)


def test_plain_classes_and_mixed_tags() -> None:
    assert is_reversed(["NN", "VB", "NN-TL", "O"]) is None
    assert is_reversed(["0", "1", "2"]) is None
    assert is_reversed(["O"]) is False
    with pytest.raises(DataError, match=r"the tag 'MISC' has no prefix, but 'B-PER' has one; expe"):
        is_reversed(["O", "B-PER", "I-PER", "MISC"])
