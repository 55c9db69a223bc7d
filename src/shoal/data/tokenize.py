"""Tokenizers: trained on the corpus and cached, or taken from a model folder."""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from shoal.data.storage import appearing, note_contents, noted_damage
from shoal.environment import cache_directory
from shoal.errors import DataError

PAD, END, MASK = "<|pad|>", "<|end|>", "<|mask|>"
_FORMAT = 3
_NOTES = "shoal-files.json"
CHARACTERS_PER_TOKEN = 1000
"""Read for training, of each token to be learned: three times as many change the number of tokens
of the default text by 0.2 %, and a first start waits for them."""
MOST_CHARACTERS = 32_000_000
"""Read at most: 7 s on two cores; more text hardly changes merges, but costs memory."""
SMALLEST_VOCABULARY = 258
"""256 bytes and two special tokens: below this some text could not be written."""


def train_tokenizer(
    sources: Sequence[Iterable[str]],
    *,
    vocabulary_size: int,
    cache_key: str,
    words: bool = False,
    masks: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> Path:
    """Folder with a byte-level BPE tokenizer trained on the texts of sources (Sennrich et al.,
    https://arxiv.org/abs/1508.07909). The same texts give the same bytes, in any order.

    `cache_key` stands for the texts: they are only read when no whole tokenizer is cached for it.
    `words`: it is given single words, and puts a space before each as a text has it. `masks`: it
    gets a token that stands for a hidden one.
    Of each source as much is sampled as a vocabulary of this size needs (`CHARACTERS_PER_TOKEN`).
    Text round-trips exactly. Raises DataError when the vocabulary is too small.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"data.tokenizer.vocabulary_size: expected at least {SMALLEST_VOCABULARY} (256 bytes "
            f"and 2 special tokens), got {vocabulary_size}; 4096 suits a small corpus"
        )
    kind = f"{_FORMAT}|{vocabulary_size}|{words}{'|masks' if masks else ''}|{cache_key}"
    key = xxhash.xxh3_64_hexdigest(kind.encode())
    folder = cache_directory() / "tokenizers" / f"bpe-{vocabulary_size}-{key}"
    wrong = noted_damage(folder, notes=_NOTES)
    if wrong is None:
        return folder
    if folder.exists():
        announce(f"the cached tokenizer is damaged and trained again: {wrong}")
    announce(f"training a tokenizer of {vocabulary_size} tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=words)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, END, *([MASK] if masks else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    count = min(MOST_CHARACTERS, CHARACTERS_PER_TOKEN * vocabulary_size)
    texts = in_turns([sampled(texts, count=count) for texts in sources])
    tokenizer.train_from_iterator(_first(texts, count=count), trainer)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        **({"add_prefix_space": True} if words else {}),
        **({"mask_token": MASK} if masks else {}),
    }
    with appearing(folder, is_whole=_is_whole, error=DataError) as scratch:
        (scratch / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        text = json.dumps(about, indent=1)
        (scratch / "tokenizer_config.json").write_text(text, encoding="utf-8")
        note_contents(scratch, notes=_NOTES)
    return folder


def _is_whole(folder: Path) -> bool:
    return noted_damage(folder, notes=_NOTES) is None


def in_turns(sources: Sequence[Iterator[str]]) -> Iterator[str]:
    """A text of each source after the other until all are read, so that any beginning has all."""
    for texts in itertools.zip_longest(*sources):
        yield from (text for text in texts if text is not None)


def sampled(texts: Iterable[str], *, count: int) -> Iterator[str]:
    """Whole texts of `count` characters together, picked by their hashes: the same in any order."""
    kept: list[tuple[int, str]] = []
    characters = 0
    for text in texts:
        heapq.heappush(kept, (-xxhash.xxh3_64_intdigest(text.encode()), text))
        characters += len(text)
        while characters - len(kept[0][1]) >= count:
            characters -= len(heapq.heappop(kept)[1])
    yield from (text for _, text in sorted(kept, reverse=True))


def _first(texts: Iterable[str], *, count: int) -> Iterator[str]:
    """Whole texts until they hold `count` characters together."""
    for text in texts:
        yield text
        count -= len(text)
        if count <= 0:
            return


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a folder (its tokenizer.json), with its padding and truncation switched off.

    Raises DataError when there is none.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file; expected the tokenizer of a model or of data. "
            f"Name a folder that holds tokenizer.json, or use data.tokenizer.kind: train"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise DataError(f"{path}: is not a tokenizer: {error}; fetch or train it again") from error
    # Some files (MiniLM's) pad and cut every text to a fixed length, which is the packer's work.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenizer_key(folder: Path | str) -> str:
    """Hash of a tokenizer, for cache keys."""
    return xxhash.xxh3_128_hexdigest((Path(folder) / "tokenizer.json").read_bytes())


def check_vocabulary(tokenizer: Tokenizer, *, model_vocabulary_size: int) -> None:
    """Raise DataError when the tokenizer can give ids that the model has no embedding for."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= model_vocabulary_size:
        raise DataError(
            f"model.vocab_size: the tokenizer gives ids up to {largest}, the model has "
            f"{model_vocabulary_size} embeddings; expected at least {largest + 1}. Use the "
            f"model's own tokenizer (data.tokenizer.kind: model), leave vocab_size out, or set "
            f"data.tokenizer.vocabulary_size to at most {model_vocabulary_size}"
        )
