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
from shoal.data.columns import content_hash
from shoal.data.pack import Part, Shape
from shoal.data.storage import UNREADABLE, appearing, damage
from shoal.data.write import EncodedSamples, Sample, write_parts
from shoal.errors import DataError
from shoal.fields import TOKENS, Fields
from shoal.units import format_bytes

FORMAT = 3
_DESCRIPTION = "description.json"
_BATCH_RECORDS = 1000
_TOLD_BYTES = 2 * 2**30
"""Data of this size take seconds to be checked, which is said."""

Encode = Callable[[list[origin.Record]], Sequence[Sample]]
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One source of a mixture: a registry name, path or hub id, and its share of the samples."""

    source: str
    weight: float = 1.0
    text_field: str | None = None
    split: str | None = None
    """Of a folder or a data set of the hub, the part that is read."""
    max_samples: int | None = None
    """Records that are read at most, the first ones."""

    def records(
        self, *, at: Callable[[float], None] = lambda done: None
    ) -> Iterator[origin.Record]:
        """Its records, in its own order. Raises what `read_records` raises."""
        return origin.read_records(
            self.source,
            text_field=self.text_field,
            split=self.split,
            most=self.max_samples,
            at=at,
        )

    @property
    def content_key(self) -> str:
        """Changes whenever its records do, and when its files do."""
        files = origin.content_key(self.source, split=self.split)
        return json.dumps([files, self.text_field, self.max_samples])


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
        """Samples of a part: packed rows of documents, or records; 0 where it has no such part."""
        return int(self.about["parts"].get(part, {"samples": 0})["samples"])


@dataclass(frozen=True)
class Prepared:
    """Prepared data. `directory` is all that a worker needs: `open_prepared(directory)`."""

    directory: Path
    sources: tuple[PreparedSource, ...]
    """What is trained on."""
    evaluated: tuple[PreparedSource, ...]
    """What holds the validation samples: the same sources, or others."""
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
    validation_fraction: float | None,
    out: Path,
    evaluated: Sequence[SourceSpec] = (),
    fields: Fields = TOKENS,
    seed: int = 0,
    progress: Progress = lambda phase, done: None,
) -> Prepared:
    """Encode `sources` into a folder below `out`, or find the one made before.

    `encode` turns records into samples with the `fields` of a batch, or those of them that are
    stored (data/pack.py); `encode_key` must change whenever it does (tokenizer, task, settings).
    Validation samples are a fraction of each source, or all of the sources `evaluated`.
    Which documents are held out does not depend on `seed`, which only orders them: leave it at 0
    and all seeds of a study share one folder.
    What was made before is checked byte by byte; what is damaged is made again, and `progress` is
    told so.
    Raises DataError (too little text, ids that do not fit, no space left) and what sources raise.
    """
    settings = {"sequence_tokens": sequence_tokens, "packing": packing, "seed": seed}

    def entries(specs: Sequence[SourceSpec], *, fraction: float | None) -> list[dict[str, Any]]:
        found = []
        for name, spec in zip(_names(specs), specs):
            job = _Job(
                spec=spec,
                encode=encode,
                encode_key=encode_key,
                fields=fields,
                settings={**settings, "validation_fraction": fraction},
                progress=progress,
            )
            directory = f"../{job.folder(out).name}"
            found.append({"name": name, "directory": directory, **asdict(spec)})
        return found

    mixture = {
        "sources": entries(sources, fraction=0.0 if evaluated else validation_fraction),
        "evaluated": entries(evaluated, fraction=1.0),
    }
    folder = out / f"mixture-{_key(mixture)}"
    _ensure(
        folder,
        fill=lambda scratch: _describe_mixture(mixture, out=out),
        progress=progress,
    )
    return open_prepared(folder)


def open_prepared(directory: Path | str) -> Prepared:
    """Open what `prepare` made; every file is checked to have its recorded size.

    Bytes are not checked again: `prepare` has, once for all workers.
    Raises DataError when something is missing or was cut short.
    """
    directory = Path(directory).resolve()  # workers may have another current folder
    description = _read_description(directory)
    sources, evaluated = (
        tuple(_open(entry, of=directory) for entry in description.get(role, ()))
        for role in ("sources", "evaluated")
    )
    return Prepared(directory, sources, evaluated or sources, description)


def _open(entry: dict[str, Any], *, of: Path) -> PreparedSource:
    folder = of.parent / _sibling(entry, of=of)
    about = _read_description(folder)
    if about.get("format") != FORMAT:
        raise DataError(
            f"{folder}: was prepared by another version of shoal (format "
            f"{about.get('format')}, expected {FORMAT}); run the recipe to prepare it again"
        )
    shape = Shape.from_json(about["shape"])
    return PreparedSource(entry["name"], entry["weight"], folder, shape, about)


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
        spec = self.spec
        origin.locate(spec.source, split=spec.split, announce=lambda line: self.progress(line, 0.0))
        depends_on = {
            "content": spec.content_key,
            "encode": self.encode_key,
            "fields": {name: asdict(field) for name, field in self.fields.items()},
            **self.settings,
        }
        folder = out / f"source-{_key(depends_on)}"
        _ensure(folder, fill=self.run, progress=self.progress)
        return folder

    def run(self, scratch: Path) -> dict[str, Any]:
        """Write the parts into `scratch`; their description."""
        name = origin.locate(self.spec.source).name
        samples = EncodedSamples(scratch, fields=self.fields, where=name)
        what = "tokenizing" if "input_ids" in self.fields else "reading"
        for batch in self._batches(f"{what} {name}"):
            samples.add(self.encode(batch), hashes=[content_hash(record) for record in batch])
        self.progress(f"{what} {name}", 1.0)
        return write_parts(samples, **self.settings)

    def _batches(self, phase: str) -> Iterator[list[origin.Record]]:
        batch: list[origin.Record] = []
        for record in self.spec.records(at=lambda done: self.progress(phase, min(done, 0.99))):
            batch.append(record)
            if len(batch) == _BATCH_RECORDS:
                yield batch
                batch = []
        if batch:
            yield batch


def _describe_mixture(mixture: dict[str, Any], *, out: Path) -> dict[str, Any]:
    entries = [*mixture["sources"], *mixture["evaluated"]]
    abouts = [_read_description(out / Path(entry["directory"]).name) for entry in entries]
    if len({json.dumps(about["shape"]["stored"]) for about in abouts}) > 1:
        raise DataError(
            "data.source: some sources of the mixture have labels of their own and some have none; "
            "expected one kind. Train on them separately"
        )
    parts: dict[str, dict[str, int]] = {}
    for about in abouts:
        for part, counts in about["parts"].items():
            total = parts.setdefault(part, dict.fromkeys(counts, 0))
            total.update({what: total[what] + count for what, count in counts.items()})
    content = [about["content"] for about in abouts]
    return {**mixture, "files": {}, "content": content, "parts": parts}


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


def _ensure(folder: Path, *, fill: Callable[[Path], dict[str, Any]], progress: Progress) -> None:
    """Make `folder` by filling a scratch folder, its description last, unless it is whole."""
    wrong = _damage(folder, progress=progress)
    if wrong is None:
        return
    if folder.exists():
        progress(f"prepared data is damaged and made again: {wrong}", 0.0)
    with appearing(folder, is_whole=lambda made: _damage(made) is None, error=DataError) as scratch:
        about = {"format": FORMAT, **fill(scratch)}
        text = json.dumps({**about, "checksum": _key(about)}, indent=1)
        (scratch / _DESCRIPTION).write_text(text, encoding="utf-8")


def prepared_damage(folder: Path) -> str | None:
    """What is wrong with a folder of prepared data, down to the last bit; None for another kind."""
    return _damage(folder) if (folder / _DESCRIPTION).is_file() else None


def _damage(folder: Path, *, progress: Progress = lambda phase, done: None) -> str | None:
    """What is wrong with prepared data, down to the last bit; None: nothing."""
    try:
        about: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        checksum = about.pop("checksum")
        if about["format"] != FORMAT or checksum != _key(about):
            return f"{folder / _DESCRIPTION}: is not what was written"
        size = sum(about["files"].values())
        if size > _TOLD_BYTES:
            progress(f"checking {format_bytes(size)} of prepared data", 0.0)
        return damage(folder, about, hashed=True)
    except UNREADABLE as error:
        return f"{folder / _DESCRIPTION}: cannot be read: {error!r}"


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        wrong = damage(folder, about, hashed=False)
    except UNREADABLE as error:
        raise DataError(
            f"{folder}: expected prepared data with a {_DESCRIPTION}, got {error!r}; prepare it "
            f"again by running the recipe"
        ) from error
    if wrong is not None:
        raise DataError(f"{wrong}; delete {folder}, the next run prepares it again")
    return about
