import math

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from shoal.errors import ConfigError, DataError
from shoal.models.anatomy import anatomy_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.tasks.kinds import KINDS, create
from shoal.tasks.task import Scores, Tools
from shoal.tasks.token_classification import TokenClassification

TAGS = ["O", "B-loc", "B-per", "I-loc", "I-per"]
RECORDS = [
    {"words": ["Ada", "visits", "Bergen"], "tags": ["B-per", "O", "B-loc"]},
    {"words": ["Lovelace", "!"], "tags": ["I-per", "I-loc"]},
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
    assert samples[1] == {"input_ids": [0, 7, 8, 2, 1], "labels": [-100, 4, -100, 3, -100]}


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
