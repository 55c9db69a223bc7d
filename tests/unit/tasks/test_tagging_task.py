import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, GPT2TokenizerFast

from shoal.data.tokenize import load_tokenizer, train_tokenizer
from shoal.errors import ConfigError, DataError
from shoal.fields import IGNORED
from shoal.models.anatomy import anatomy_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.tasks.kinds import KINDS, create
from shoal.tasks.lookup import Dictionary
from shoal.tasks.task import Scores, Tools
from shoal.tasks.token_classification import TokenClassification

TAGS = ["O", "B-loc", "B-per", "I-loc", "I-per"]
RECORDS = [
    {"words": ["Ada", "visits", "Bergen"], "tags": ["B-per", "O", "B-loc"]},
    {"words": ["Lovelace", "!"], "tags": ["B-loc", "I-loc"]},
    {"words": ["Ada", "Lovelace"], "tags": ["B-per", "I-per"]},
]


def _tokenizer() -> Tokenizer:
    pieces = ["[CLS]", "[SEP]", "[UNK]", "ada", "visits", "berg", "##en", "love", "##lace"]
    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return made


def _task() -> TokenClassification:
    task = TokenClassification()
    task.learn(RECORDS)
    return task


def test_tags_are_learned_sorted_with_o_first() -> None:
    settings = TokenClassification().learn(RECORDS)
    assert settings == {"tags": TAGS}
    model = create("token-classification", settings=settings).model_settings()
    assert model["num_labels"] == 5 and model["id2label"][2] == "B-per"
    assert model["label2id"]["I-per"] == 4


def test_the_first_piece_of_a_word_carries_its_tag() -> None:
    samples = _task().encode(RECORDS, tools=Tools(_tokenizer()))
    assert samples[0] == {
        "input_ids": [0, 3, 4, 5, 6, 1],
        "labels": [-100, 2, 0, 1, -100, -100],
    }
    assert samples[1] == {"input_ids": [0, 7, 8, 2, 1], "labels": [-100, 1, -100, 3, -100]}


def learned(*sentences: str) -> TokenClassification:
    task = TokenClassification()
    task.learn([{"words": tags.split(), "tags": tags.split()} for tags in sentences])
    return task


@pytest.mark.parametrize(
    ("sentence", "tags", "note"),
    [
        ("B-per E-per O S-loc", ["O", "B-loc", "B-per", "I-per"],
         "tags (BIOES) are read as BIO2: E-per as I-per, S-loc as B-loc"),
        ("B-per L-per O U-loc", ["O", "B-loc", "B-per", "I-per"],
         "tags (BILOU) are read as BIO2: L-per as I-per, U-loc as B-loc"),
        ("I-per I-per O", ["O", "B-per", "I-per"],
         "tags (IOB1) are read as BIO2: I-per as B-per"),
        ("per-B per-I O loc-B", ["O", "B-loc", "B-per", "I-per"],
         "tags (IOB1, prefixes behind) are read as BIO2: loc-B as B-loc, per-B as B-per, per-I as "
         "I-per"),
        ("3 7 3", ["3", "7"], "tags have no B- or I-: plain classes, scored word by word; the data "
         "does not say what the numbers mean"),
        ("NN VB", ["NN", "VB"], "tags have no B- or I-: plain classes, scored word by word"),
        ("O O", ["O"], "all words are tagged O: there is nothing to find"),
    ],
)  # fmt: skip
def test_other_schemes_are_translated_and_that_is_said(
    sentence: str, tags: list[str], note: str
) -> None:
    task = learned(sentence)
    assert task.settings["tags"] == tags and task.notes == [note]
    again = create("token-classification", settings=task.settings)
    record = {"words": ["ada"] * len(sentence.split()), "tags": sentence.split()}
    (sample,) = again.encode([record], tools=Tools(_tokenizer()))
    assert all(label == -100 or label < len(tags) for label in sample["labels"])


def test_bio2_needs_no_word() -> None:
    task = learned("B-per I-per O")
    assert task.notes == [] and task.settings == {"tags": ["O", "B-per", "I-per"]}


def test_a_sentence_is_encoded_in_bio2() -> None:
    task = learned("B-per E-per S-loc", "O")
    record = {"words": ["ada", "love", "berg"], "tags": ["B-per", "E-per", "S-loc"]}
    (sample,) = task.encode([record], tools=Tools(_tokenizer()))
    named = [task.settings["tags"][label] for label in sample["labels"] if label >= 0]
    assert named == ["B-per", "I-per", "B-loc"]


def test_plain_classes_are_scored_word_by_word() -> None:
    """Macro F1 by its definition: the mean over classes of 2 right / (gold + said)."""
    task = learned("NN VB NN DT")
    labels = torch.tensor([[0, 1, -100, 2], [2, 2, -100, -100], [1, 1, 1, 1]])
    found = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 0], [0, 0, 0, 0]])
    metrics = task.metrics()
    batch = {"labels": labels, "sample_ids": torch.tensor([0, 1, -1])}
    losses = torch.where(labels == -100, 0.0, 0.25)
    metrics.add(batch=batch, scores=Scores(losses, found))
    scores = metrics.result()
    assert "entity_f1" not in scores
    assert scores["accuracy"] == pytest.approx(3 / 5) and scores["evaluation_loss"] == 0.25
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 2) / 3)
    assert scores["majority_tag_accuracy"] == pytest.approx(3 / 5)
    assert task.words(scores, scores) == [
        "accuracy: 0.600 before, 0.600 now; the most frequent tag for every word: 0.600"
    ]


def test_no_entity_found_is_said_beside_a_high_accuracy() -> None:
    scores = _scores([["O"] * 30 + ["B-per"]], [["O"] * 31])
    lines = _task().words(None, scores)
    assert lines[1] == "no entity was found as a whole, though 96.8% of the tags are right"


def byte_level(*, prefix: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    texts = ["Ada visits Bergen, Ada's friend visits Oslo.", "visit Bergen! (Bergen) isn't Oslo"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(texts * 20, trainer)
    return made


WORDS = ["Ada", "visits", "Bergen", "(", "Oslo", ")", "isn't", " Oslo", "Ærø", "!"]


def encoded(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    task = learned(" ".join(f"B-x{n}" for n in range(len(WORDS))))
    record = {"words": WORDS, "tags": [f"B-x{n}" for n in range(len(WORDS))]}
    (sample,) = task.encode([record], tools=Tools(tokenizer))
    return sample["input_ids"], [at for at, label in enumerate(sample["labels"]) if label >= 0]


@pytest.mark.parametrize("prefix", [False, True])
def test_words_keep_their_space_as_transformers_has_it(prefix: bool) -> None:
    tokenizer = byte_level(prefix=prefix)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    theirs = GPT2TokenizerFast(vocab=model["vocab"], merges=merges, add_prefix_space=True)
    expected = theirs(WORDS, is_split_into_words=True)
    ids, firsts = encoded(tokenizer)
    assert ids == expected["input_ids"]
    words = expected.word_ids()
    assert firsts == [words.index(number) for number in range(len(WORDS))]
    assert tokenizer.id_to_token(ids[1])[0] == "Ġ"


def test_a_rule_in_front_of_the_bytes_splits_no_space_off() -> None:
    """Llama 3 and Qwen split by a pattern first: a space then is put before the word, no more."""
    tokenizer = byte_level()
    plain = encoded(tokenizer)
    pattern = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert encoded(tokenizer) == plain
    assert tokenizer.decode(plain[0]) == "".join(
        word if word[0] == " " else f" {word}" for word in WORDS
    )


def test_a_tokenizer_trained_for_words_gives_transformers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    texts = ["Ada visits Bergen", "Oslo visits Ada"] * 30
    folder = train_tokenizer([texts], vocabulary_size=300, cache_key="words", words=True)
    theirs = AutoTokenizer.from_pretrained(folder)(WORDS, is_split_into_words=True)
    ids, _ = encoded(load_tokenizer(folder))
    assert theirs["input_ids"] == ids
    assert "Ġvisits" in load_tokenizer(folder).encode(" visits").tokens
    assert load_tokenizer(folder).id_to_token(ids[1]) == "Ġvisits"


@pytest.mark.parametrize(
    ("record_", "expected"),
    [
        ({"text": "a"}, r"lists under 'words' and 'tags', got keys \['text'\]"),
        (
            {"words": ["a", "b"], "tags": ["O"]},
            "2 words but 1 tags in the record that begins 'a b'",
        ),
        ({"words": ["a"], "tags": ["B-new"]}, "tag 'B-new' is not among the 5 tags known"),
    ],
)
def test_bad_records_are_refused(record_: dict, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        _task().encode([record_], tools=Tools(_tokenizer()))


def _scores(gold: list[list[str]], guesses: list[list[str]], **more: object) -> dict[str, float]:
    task = _task()
    metrics = task.metrics()
    width = max(map(len, gold)) + 1
    ids = [[TAGS.index(t) for t in row] + [-100] * (width - len(row)) for row in gold]
    found = [[TAGS.index(t) for t in row] + [0] * (width - len(row)) for row in guesses]
    batch = {"labels": torch.tensor(ids), **more}
    losses = torch.where(batch["labels"] == -100, 0.0, 0.5)
    metrics.add(batch=batch, scores=Scores(losses, torch.tensor(found)))
    return metrics.result()


def test_entity_scores_count_whole_spans() -> None:
    gold = [["B-per", "I-per", "O", "B-loc"], ["O", "B-loc"]]
    guess = [["B-per", "I-per", "O", "B-per"], ["B-loc", "B-loc"]]
    scores = _scores(gold, guess)
    # gold 3 spans, found 4, of which (per 0-2) and (loc 1-2 of the second) are right
    assert scores["entity_precision"] == 0.5
    assert scores["entity_recall"] == pytest.approx(2 / 3)
    assert scores["entity_f1"] == pytest.approx(4 / 7)
    assert scores["token_accuracy"] == pytest.approx(4 / 6)
    assert scores["evaluation_loss"] == 0.5 and scores["evaluation_targets"] == 6
    # tags tie at two words each: O is first, which tags no entity
    assert (scores["majority_tag_f1"], scores["majority_tag_accuracy"]) == (
        0.0,
        pytest.approx(1 / 3),
    )


def test_the_majority_tag_may_be_an_entity() -> None:
    gold = [["B-per", "B-per", "B-per", "O"]]
    scores = _scores(gold, [["O"] * 4])
    # always B-per: four spans, three of them right, three in gold
    assert scores["majority_tag_f1"] == pytest.approx(2 * 0.75 / 1.75)
    assert scores["entity_f1"] == 0.0


def test_scores_add_up_over_ranks_and_skip_doubled_rows() -> None:
    gold, guess = [["B-per", "O"], ["B-loc", "I-loc"]], [["B-per", "O"], ["B-loc", "O"]]
    both = _task().metrics()
    parts = []
    for row in range(2):
        part = _task().metrics()
        labels = torch.tensor([[TAGS.index(t) for t in gold[row]]] * 2)
        found = torch.tensor([[TAGS.index(t) for t in guess[row]]] * 2)
        ids = torch.tensor([row, -1])
        part.add(
            batch={"labels": labels, "sample_ids": ids},
            scores=Scores(torch.ones(2, 2), found),
        )
        parts.append(part.vector())
    together = both.result(parts[0] + parts[1])
    assert together["evaluation_targets"] == 4 and together["entity_f1"] == 0.5
    assert math.isnan(both.result()["evaluation_loss"])


def test_output_gives_a_state_for_every_label() -> None:
    task = _task()
    config = read_config(
        architecture="bert",
        settings={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "intermediate_size": 16, **task.model_settings()},
        vocabulary_size=9,
    )  # fmt: skip
    model = build_meta(config, auto_class=task.auto_class)
    materialise(model, record=record(model), seed=0)
    ids = torch.arange(6).view(1, 6)
    batch = {"input_ids": ids, "labels": ids % 5}
    output = task.output(model, anatomy_of(model), batch)
    assert output.each(predict=True).predictions.shape == (1, 6)
    wanted = model(input_ids=ids, labels=batch["labels"]).loss  # transformers' own mean
    assert float(output.total().detach()) / 6 == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert model.config.id2label[2] == "B-per"


def test_unknown_kinds_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'causal_lm'.*did you mean 'causal-lm'"):
        create("causal_lm")
    for kind, task in KINDS.items():
        assert create(kind).kind == kind and isinstance(create(kind), task)


def test_a_dictionary_of_the_training_part() -> None:
    """By hand: 7 8 is a place three times, 9 a person once of three times that it stands there, and
    the 2 that closes each row belongs to no word."""
    tags = ["O", "B-LOC", "I-LOC", "B-PER"]
    x = IGNORED

    def row(ids: list[int], labels: list[int]) -> dict:
        return {"input_ids": [1, *ids, 2], "labels": [x, *labels, x]}

    train = [
        row([5, 7, 8], [0, 1, 2]),
        row([7, 8, 9], [1, x, 3]),
        row([9, 5, 9], [0, 0, 0]),
        row([4, 7, 8], [0, 1, 2]),
    ]
    known = Dictionary(train, tags=tags)
    scored = [row([7, 8], [1, 2]), row([9, 5], [3, 0]), row([5, 7, 8], [0, 0, 1])]
    # found: two places, one of them right; wanted: two places and a person
    assert known.f1(scored) == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert Dictionary([row([5], [0])], tags=tags).f1(scored) == 0


def test_a_picture_of_what_was_taken_for_what(tmp_path: Path) -> None:
    """Types without their prefixes: an I-LOC taken for a B-LOC is a LOC."""
    task = TokenClassification({"tags": ["O", "B-LOC", "I-LOC", "B-PER"]})
    metrics = task.metrics()
    batch = {"labels": np.array([[1, 2, 0, 3, IGNORED]]), "sample_ids": np.array([0])}
    metrics.add(batch=batch, scores=Scores(torch.zeros(1, 5), torch.tensor([[1, 1, 0, 2, 3]])))
    shown = metrics.shown(metrics.vector(), [])
    assert shown["names"] == ["O", "LOC", "PER"]
    assert shown["confusion"] == [[1, 0, 0], [0, 2, 0], [0, 1, 0]]
    task.draw(shown, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
