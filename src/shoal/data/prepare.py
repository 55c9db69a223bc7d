"""Prepares data once: records are encoded, split into parts and written as mapped files.

The result is a folder that any worker opens by path. It is cached by a hash of everything it
depends on, appears whole or not at all, and is the same whatever the number of workers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from shoal.data import sources as origin
from shoal.data.pack import Part, Shape
from shoal.data.storage import appearing
from shoal.data.write import EncodedSamples, Sample, write_parts
from shoal.errors import DataError
from shoal.fields import TOKENS, Fields
from shoal.untrusted import is_plain_name

FORMAT = 2
_DESCRIPTION = "description.json"
_BATCH_RECORDS = 1000

Encode = Callable[[list[origin.Record]], Sequence[Sample]]
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One source of a mixture: a registry name, path or hub id, and its share of the samples."""

    source: str
    weight: float = 1.0
    text_field: str | None = None


@dataclass(frozen=True)
class PreparedSource:
    """One source, encoded. `about` is its description.json: counts of each part and file."""

    name: str
    weight: float
    directory: Path
    shape: Shape
    about: dict[str, Any]

    def part(self, part: str) -> Part:
        """Open "train" or "validation". Each worker (each thread) opens its own."""
        return Part(self.directory, part=part, shape=self.shape, num_samples=self.num_samples(part))

    def num_samples(self, part: str) -> int:
        """Samples of a part: packed rows of documents, or records."""
        return int(self.about["parts"][part]["samples"])


@dataclass(frozen=True)
class Prepared:
    """Prepared data. `directory` is all that a worker needs: `open_prepared(directory)`."""

    directory: Path
    sources: tuple[PreparedSource, ...]
    description: dict[str, Any]
    """JSON-able: names, weights, counts of samples and targets."""

    @property
    def shape(self) -> Shape:
        """How samples are cut, and their fields; the same for all sources."""
        return self.sources[0].shape


def prepare(
    *,
    sources: Sequence[SourceSpec],
    encode: Encode,
    encode_key: str,
    sequence_tokens: int,
    packing: bool,
    validation_fraction: float,
    out: Path,
    fields: Fields = TOKENS,
    seed: int = 0,
    progress: Progress = lambda phase, done: None,
) -> Prepared:
    """Encode `sources` into a folder below `out`, or find the one made before.

    `encode` turns records into samples with the `fields` of a batch, or those of them that are
    stored (data/pack.py); `encode_key` must change whenever it does (tokenizer, task, settings).
    Which documents are held out does not depend on `seed`, which only orders them: leave it at 0
    and all seeds of a study share one folder.
    Raises DataError (too little text, ids that do not fit, no space left) and what sources raise.
    """
    settings = {
        "sequence_tokens": sequence_tokens,
        "packing": packing,
        "validation_fraction": validation_fraction,
        "seed": seed,
    }
    jobs = [
        _Job(
            spec=spec,
            encode=encode,
            encode_key=encode_key,
            fields=fields,
            settings=settings,
            progress=progress,
        )
        for spec in sources
    ]
    folders = [job.folder(out) for job in jobs]
    mixture = {
        "sources": [
            {"name": name, "directory": f"../{folder.name}", **asdict(spec)}
            for name, folder, spec in zip(_names(sources), folders, sources)
        ]
    }
    folder = out / f"mixture-{_key(mixture)}"
    if not _is_whole(folder):
        _build(folder, fill=lambda scratch: _describe_mixture(mixture, folders=folders))
    return open_prepared(folder)


def open_prepared(directory: Path | str) -> Prepared:
    """Open what `prepare` made; every file is checked to have its recorded size.

    Raises DataError when something is missing or was cut short.
    """
    directory = Path(directory).resolve()  # workers may have another current folder
    description = _read_description(directory)
    opened = []
    for entry in description["sources"]:
        folder = directory.parent / _sibling(entry, of=directory)
        about = _read_description(folder)
        if about.get("format") != FORMAT:
            raise DataError(
                f"{folder}: was prepared by another version of shoal (format "
                f"{about.get('format')}, expected {FORMAT}); run the recipe to prepare it again"
            )
        shape = Shape.from_json(about["shape"])
        opened.append(PreparedSource(entry["name"], entry["weight"], folder, shape, about))
    return Prepared(directory, tuple(opened), description)


def _sibling(entry: Any, *, of: Path) -> str:
    """Name of the folder, beside the mixture's, that one of its sources is in. DataError."""
    match = re.fullmatch(r"\.\./(source-[0-9a-f]+)", str(entry["directory"]))
    if match is None or (of.parent / match[1]).is_symlink():
        raise DataError(
            f"{of}: its {_DESCRIPTION} names {str(entry['directory'])[:80]!r}, which is no source "
            "beside it; delete the folder, the next run prepares it again"
        )
    return match[1]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Encoding one source."""

    spec: SourceSpec
    encode: Encode
    encode_key: str
    fields: Fields
    settings: dict[str, Any]
    progress: Progress

    def folder(self, out: Path) -> Path:
        """The folder of this source below `out`, filled now or before."""
        origin.locate(self.spec.source, announce=lambda line: self.progress(line, 0.0))
        depends_on = {
            "content": origin.content_key(self.spec.source),
            "text_field": self.spec.text_field,
            "encode": self.encode_key,
            "fields": {name: asdict(field) for name, field in self.fields.items()},
            **self.settings,
        }
        folder = out / f"source-{_key(depends_on)}"
        if not _is_whole(folder):
            _build(folder, fill=self.run)
        return folder

    def run(self, scratch: Path) -> dict[str, Any]:
        """Write the parts into `scratch`; their description."""
        name = origin.locate(self.spec.source).name
        samples = EncodedSamples(scratch, fields=self.fields, where=name)
        what = "tokenizing" if "input_ids" in self.fields else "reading"
        for batch in self._batches(f"{what} {name}"):
            samples.add(self.encode(batch))
        self.progress(f"{what} {name}", 1.0)
        return write_parts(samples, **self.settings)

    def _batches(self, phase: str) -> Iterator[list[origin.Record]]:
        batch: list[origin.Record] = []
        records = origin.read_records(
            self.spec.source,
            text_field=self.spec.text_field,
            at=lambda done: self.progress(phase, min(done, 0.99)),
        )
        for record in records:
            batch.append(record)
            if len(batch) == _BATCH_RECORDS:
                yield batch
                batch = []
        if batch:
            yield batch


def _describe_mixture(mixture: dict[str, Any], *, folders: Sequence[Path]) -> dict[str, Any]:
    abouts = [_read_description(folder) for folder in folders]
    if len({json.dumps(about["shape"]["stored"]) for about in abouts}) > 1:
        raise DataError(
            "data.source: some sources of the mixture have labels of their own and some have none; "
            "expected one kind. Train on them separately"
        )
    return {
        **mixture,
        "files": {},
        "parts": {
            part: {
                what: sum(about["parts"][part][what] for about in abouts)
                for what in abouts[0]["parts"][part]
            }
            for part in ("train", "validation")
        },
    }


def _names(sources: Sequence[SourceSpec]) -> list[str]:
    """A name per source, in order; the second of equal names gets a number."""
    names: list[str] = []
    for spec in sources:
        name = origin.locate(spec.source).name
        taken = sum(1 for other in names if other.partition("#")[0] == name)
        names.append(f"{name}#{taken + 1}" if taken else name)
    return names


def _key(parts: dict[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _build(folder: Path, *, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Make `folder` by filling a scratch folder, its description last."""
    with appearing(folder, is_whole=_is_whole, error=DataError) as scratch:
        text = json.dumps({"format": FORMAT, **fill(scratch)}, indent=1)
        (scratch / _DESCRIPTION).write_text(text, encoding="utf-8")


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        sizes = about["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder}: expected prepared data with a {_DESCRIPTION}, got {error!r}; prepare it "
            f"again by running the recipe"
        ) from error
    for name, size in sizes.items():
        path = folder / name
        there = is_plain_name(name) and path.is_file() and not path.is_symlink()
        got = path.stat().st_size if there else None
        if got != size:
            raise DataError(
                f"{path}: expected {size} bytes, got {'no file' if got is None else got}; delete "
                f"{folder}, the next run prepares it again"
            )
    return about


def _is_whole(folder: Path) -> bool:
    try:
        return _read_description(folder)["format"] == FORMAT
    except DataError:
        return False
