"""Reading on: every line once, in any pieces, over restarts; or from the beginning."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shoal.page.tail import Place, read_on


@given(st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=30), st.data())
def test_each_line_is_read_once_however_it_was_written(
    tmp_path_factory, lines: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("tail") / "rows"
    text = b"".join(line + b"\n" for line in lines)
    place, found, at = Place(), [], 0
    while at < len(text):
        size = data.draw(st.integers(1, len(text) - at))
        with open(path, "ab") as file:
            file.write(text[at : at + size])
        at += size
        new, place, anew = read_on(path, Place.from_text(str(place)))  # as a browser keeps it
        assert anew is (bool(new) and not found)
        found += new
    assert found == lines


def test_a_half_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"one\ntw")
    lines, place, _ = read_on(path, Place())
    assert lines == [b"one"] and place.offset == 4
    path.write_bytes(b"one\ntwo\n")
    assert read_on(path, place)[0] == [b"two"]


def test_a_file_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"one\ntwo\nthree\n")
    _, place, _ = read_on(path, Place())
    for text in (b"one\n", b"one\ntwo\nother\n", b"one\ntwo\nother\nfour\n", b""):
        path.write_bytes(text)
        lines, after, anew = read_on(path, place)
        assert anew and lines == text.split(b"\n")[:-1] and after.offset == len(text)


def test_a_copy_goes_on_where_the_original_was(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"one\ntwo\n")
    _, place, _ = read_on(tmp_path / "rows", Place())
    (tmp_path / "copy").write_bytes(b"one\ntwo\nthree\n")
    assert read_on(tmp_path / "copy", place)[0::2] == ([b"three"], False)


def test_what_was_read_of_a_file_that_goes_away_stays(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"one\n")
    _, place, anew = read_on(path, Place())
    assert anew
    path.unlink()
    assert read_on(path, place) == ([], place, False)
    path.write_bytes(b"one\ntwo\n")
    assert read_on(path, place)[0::2] == ([b"two"], False)
    assert read_on(tmp_path / "none", Place()) == ([], Place(), False)


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"one\n")
    (tmp_path / "rows").symlink_to(tmp_path / "secret")
    assert read_on(tmp_path / "rows", Place())[0] == []


def test_a_place_is_read_back_and_nothing_else_is() -> None:
    place = Place(123, 0xDEADBEEF, 45)
    assert Place.from_text(str(place)) == place
    for text in ("", "1", "1-2", "-1-2-3", "1-xyz-3", "9" * 30 + "-0-0", "1-2-3-4"):
        assert Place.from_text(text) == Place()
