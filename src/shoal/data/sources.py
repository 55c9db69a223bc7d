"""Where records come from: a registry name, a local file or folder, or a dataset of the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Literal

import xxhash

from shoal.data import readers, registry
from shoal.data.audio import recordings_beside, with_sound
from shoal.data.columns import Record, named_classes, table_records
from shoal.data.made import MADE
from shoal.data.storage import hash_of
from shoal.environment import hub_is_offline
from shoal.errors import DataError, FetchError, nearest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Located:
    """A source that was found: what it is and where its bytes lie."""

    source: str
    kind: Literal["made", "registry", "local", "hub"]
    paths: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """A short name for logs and tables."""
        return Path(self.source).name if self.kind == "local" else self.source


def locate(
    source: str, *, split: str | None = None, announce: Callable[[str], None] = lambda line: None
) -> Located:
    """Find `source`, fetching a registry entry when it is not in the cache yet.

    `split`: of a folder only the files called so. `announce` hears what is fetched, and what of a
    folder is not read.
    Raises DataError (no such source or split, a model, an empty folder) or FetchError.
    """
    path = Path(source).expanduser()
    if split is not None and (source in {*MADE, *registry.PACKAGES} or path.is_file()):
        raise DataError(
            f"data.validation.split: {source} is a single file; expected a folder or a data set of "
            "the hub, which have splits. Name a file to evaluate on: data.validation.source=FILE"
        )
    if source in MADE:
        return Located(source, "made")
    if source in registry.PACKAGES:
        if registry.PACKAGES[source].is_model:
            data = ", ".join(name for name, p in registry.PACKAGES.items() if not p.is_model)
            raise DataError(
                f"data.source: {source!r} is a model; expected data. Use it as `model.path`, and "
                f"one of these here: {data}"
            )
        found = registry.get(source, announce=announce, hashed=False)  # a start has hashed it
        return Located(source, "registry", (found,))
    if path.is_dir():
        return Located(source, "local", _folder(path, split=split, announce=announce))
    if path.exists():
        return Located(source, "local", (path,))
    looks_local = readers.can_read(path) or path.is_absolute() or source[:1] in ".~"
    if _HUB_ID.fullmatch(source) and not looks_local and not path.parent.is_dir():
        return Located(source, "hub")
    raise DataError(f"data.source: {_missing(source, path=path)}")


def _missing(source: str, *, path: Path) -> str:
    beside: list[str] = []
    if path.parent.is_dir():
        beside = [str(path.parent / entry.name) for entry in path.parent.iterdir()]
        beside = [name for name in beside if readers.can_read(Path(name))]
    close = nearest(str(path), [*beside, *MADE, *registry.PACKAGES])
    return f"there is no file, folder or registry entry {source!r}; {close}"


def _folder(
    folder: Path, *, split: str | None, announce: Callable[[str], None]
) -> tuple[Path, ...]:
    """Readable files directly in `folder`, by name, else those in its folders: classes of images.

    Of several folders a file of each in turn, so that any beginning has all classes.
    A link that leads out of it is refused.
    """
    here = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    readable = [path for path in here if readers.can_read(path) and path.is_file()]
    # JSON beside files of other formats describes them (dataset_info.json, classes.json).
    found = [path for path in readable if path.suffix.lower() != ".json"]
    below = sorted(path for path in folder.glob("*/*") if readers.can_read(path))
    turns = zip_longest(*(list(each) for _, each in groupby(below, key=lambda path: path.parent)))
    found = found or [path for turn in turns for path in turn if path is not None] or readable
    if not found:
        raise DataError(
            f"data.source: the folder {folder} holds no file to read; expected files ending in "
            f"{', '.join(sorted(readers.FORMATS))}; recordings (.wav) need a table beside them "
            "with the columns audio and text"
        )
    home = folder.resolve()
    for path in found:
        if not path.resolve().is_relative_to(home):
            raise DataError(
                f"data.source: {path} is a link to {path.resolve()}, outside its folder; name "
                f"that file itself as a source if you mean to read it"
            )
    used = {*found, *(path.parent for path in found)}
    used |= {*recordings_beside(found), *(path.parent for path in recordings_beside(found))}
    skipped = [path.name + "/" * path.is_dir() for path in here if path not in used]
    if skipped:
        rest = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        announce(f"not read in {folder}: {', '.join(skipped[:5])}{rest}")
    return _of_split(found, folder=folder, split=split, announce=announce)


def _of_split(
    paths: list[Path], *, folder: Path, split: str | None, announce: Callable[[str], None]
) -> tuple[Path, ...]:
    """Those of a split: in a folder of its name, or called `train-0.parquet`, `train.jsonl`."""
    splits = {
        path: re.split(r"[-_.]", path.name)[0] if path.parent == folder else path.parent.name
        for path in paths
    }
    names = sorted(set(splits.values()))
    if split is None:
        others = [name for name in names if name in ("validation", "valid", "val", "dev", "test")]
        if others and "train" in names:
            announce(
                f"all of {folder} is one source, with its {' and '.join(others)} files; "
                f"data.validation={{split: {others[-1]}}} keeps them apart"
            )
        return tuple(paths)
    if split not in names:
        raise DataError(
            f"data.validation.split: no file in {folder} is of the split {split!r}; expected one "
            f"called {split}.jsonl or {split}-0.parquet, got {', '.join(names[:20])}"
        )
    return tuple(path for path in paths if splits[path] == split)


def read_records(
    source: str,
    *,
    text_field: str | None = None,
    split: str | None = None,
    most: int | None = None,
    at: Callable[[float], None] = lambda done: None,
) -> Iterator[Record]:
    """Records of a source, in its own order: `{"text": str}` or `{"words": [...], "tags": [...]}`.

    `text_field` names the column that holds the text; None: `text`, or the only text column.
    Other columns of a table are kept beside `text`. `split`: of a folder or a data set of the hub.
    `most`: no more than so many records. `at` hears how much was read, 0 to 1.
    Raises DataError or FetchError, naming the file and line.
    """
    located = locate(source, split=split)
    count = 0
    for record in _records(located, text_field=text_field, split=split, at=at):
        count += 1
        yield record
        if count == most:
            return
    if not count:
        raise DataError(
            f"data.source: {source} is empty: expected at least one document with text in it"
        )


def _records(
    located: Located, *, text_field: str | None, split: str | None, at: Callable[[float], None]
) -> Iterator[Record]:
    if located.kind == "made":
        yield from MADE[located.source].records()
        return
    if located.kind == "hub":
        yield from _hub_records(located.source, text_field=text_field, split=split or "train")
        return
    if located.kind == "registry":
        package = registry.package(located.source)
        read = readers.READERS[package.reader]
        yield from read(located.paths[0], text_field=text_field, at=at)
        return
    for number, path in enumerate(located.paths):
        read = readers.reader_of(path)

        def of_all(done: float, *, number: int = number) -> None:
            at((number + done) / len(located.paths))

        yield from with_sound(read(path, text_field=text_field, at=of_all), table=path)


def content_key(source: str, *, split: str | None = None) -> str:
    """Hash of the files of a source, so that a changed file is prepared again.

    A key of caches and no more: nothing that is learned depends on it.

    Local files: their bytes. Registry: the pinned hash. Hub: the commit that the hub names.
    """
    located = locate(source, split=split)
    if located.kind == "made":
        return f"{source} {MADE[source].version}"
    if located.kind == "registry":
        package = registry.package(source)
        # several entries read one file
        return f"{package.sha256} {package.reader} {package.version}"
    digest = xxhash.xxh3_128()
    if located.kind == "hub":
        digest.update(f"{source}@{_hub_commit(source)}:{split}".encode())
    for path in [*located.paths, *recordings_beside(located.paths)]:
        is_folder = Path(source).expanduser().is_dir()
        name = path.relative_to(Path(source).expanduser()) if is_folder else Path(path.name)
        digest.update(name.as_posix().encode())  # an image's class is the name of its folder
        digest.update(hash_of(path).encode())
    return digest.hexdigest()


def _hub_records(source: str, *, text_field: str | None, split: str) -> Iterator[Record]:
    import datasets

    datasets.disable_progress_bars()
    # Asked first because this fails at once where load_dataset retries for half a minute; and so
    # what is read is the commit that the content key names.
    commit = _hub_commit(source)
    try:
        revision = None if hub_is_offline() else commit
        table = datasets.load_dataset(source, split=split, revision=revision)
    except Exception as error:  # the hub client raises many unrelated types
        raise _hub_error(source, error=error) from error
    named = named_classes(table.features.to_dict())
    rows = ((f"{source}: row {n}", named(dict(row))) for n, row in enumerate(table, start=1))
    yield from table_records(rows, text_field=text_field)


def _hub_commit(source: str) -> str:
    if hub_is_offline():
        return "offline"
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source, timeout=20).sha or "unknown"
    except Exception as error:  # as above
        raise _hub_error(source, error=error) from error


def _hub_error(source: str, *, error: Exception) -> FetchError:
    said = (str(error).strip().splitlines() or [""])[0]
    if hub_is_offline():
        why = "HF_HUB_OFFLINE forbids asking the hub, and it is not in the local cache"
    else:
        why = f"the hub did not give it ({type(error).__name__}: {said})"
    names = ", ".join(name for name, entry in registry.PACKAGES.items() if not entry.is_model)
    return FetchError(
        f"data.source: {source!r} is neither a registry entry nor a local file, so it is taken "
        f"for a dataset of the Hugging Face hub, but {why}. Use a local file (.txt, .jsonl, "
        f".csv, .parquet), one of: {names}; or HF_HUB_OFFLINE=1 for a dataset fetched before"
    )
