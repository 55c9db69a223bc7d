"""A number for a text, such as a review's stars: a task of your own, from outside of shoal.

    PYTHONPATH=examples shoal train quickstart task.kind=own_task:TextScore data.source=MINE.jsonl \
        data.packing=false
"""

from shoal.fields import IGNORED, TOKENS, Field
from shoal.models.anatomy import hidden_of, logits_of
from shoal.tasks.losses import Summed
from shoal.tasks.scores import MeanLoss
from shoal.tasks.task import Curve, Output, Task, token_specimens


class TextScore(Task):
    """One number per text."""

    auto_class = "AutoModelForSequenceClassification"
    target_name = "texts"
    curve = Curve("squared error")

    @property
    def fields(self):
        places = {name: TOKENS[name] for name in ("input_ids", "position_ids", "document_ids")}
        return {**places, "labels": Field("float32", (), fill=IGNORED)}

    def model_settings(self):
        return {"num_labels": 1, "pad_token_id": 0}

    def encode(self, records, *, tools):
        texts = tools.tokenizer.encode_batch([record["text"] for record in records])
        return [
            {"input_ids": text.ids, "labels": float(record["score"])}
            for text, record in zip(texts, records)
        ]

    def specimens(self, config):  # made-up samples, on which it is held against transformers
        rows = token_specimens(config)
        return [{**row, "labels": number / 2} for number, row in enumerate(rows)]

    def output(self, model, anatomy, batch, *, step=0):
        hidden = hidden_of(model, dict(batch), step=step, fields=self.fields)
        head, labels = logits_of(model), batch["labels"]

        def squared_error(hidden, fields):
            error = head(hidden)[:, 0] - fields["labels"]
            return error**2 * (fields["labels"] != IGNORED)

        return Output(hidden, {"labels": labels}, Summed(squared_error))

    def metrics(self):
        return MeanLoss()

    def words(self, before, after):
        return [f"mean squared error: {after['evaluation_loss']:.3f}"]
