"""Chat fine-tuning: conversations by the model's template, the loss on what it is to answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.tasks.causal_lm import CausalLM
from shoal.tasks.task import NO_TOOLS, Batch, Record, Sample, Tools
from shoal.tasks.templates import PLAIN, Template, masked

if TYPE_CHECKING:
    from torch import Tensor


class Chat(CausalLM):
    """Next-token prediction of answers. Labels are shifted, and stored: not every token has one."""

    kind = "chat"
    closes_documents = False
    own_data = "YOUR.jsonl"

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._trained = self.options.get("train_on", "answers")

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """The template and the special tokens that it may name. `notes` say which, and of what."""
        first = next(iter(records), {})
        shape = first.get("shape", "plain text, all of which is learned")
        found = tools.chat_template
        text, name = found or (PLAIN, "shoal's plain one, for models without")
        self.settings = {
            "template": text,
            "tokens": tools.special_texts,
            "own": found is not None,
            "train_on": self._trained,
        }
        self.notes = [
            f"conversations ({shape}), by the chat template {name}; loss on {_WORDS[self._trained]}"
        ]
        return self.settings

    def _template(self, tokenizer: Any = None) -> Template:
        added = () if tokenizer is None else tokenizer.get_added_tokens_decoder().values()
        return Template(
            self.settings["template"],
            tokens=self.settings["tokens"],
            added=[token.content for token in added],
        )

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """Conversations -> `input_ids` and `labels`, each label the token after, or none.

        A record with text alone is learned whole, and closed with the end token.
        Raises DataError, with the line, for one that the template refuses.
        """
        template = self._template(tools.tokenizer)
        texts, spans, ends = [], [], []
        for record in records:
            text, answers = self._spans(record, template=template)
            texts.append(text)
            spans.append(answers)
            ends.append(
                [tools.end_token_id] * ("messages" not in record and tools.end_token_id is not None)
            )
        tools.tokenizer.no_truncation()
        tools.tokenizer.no_padding()
        encodings = tools.tokenizer.encode_batch(texts, add_special_tokens=False)
        samples = []
        for encoding, answers, end in zip(encodings, spans, ends):
            ids = [*encoding.ids, *end]
            learned = [*masked(encoding.offsets, answers), *(True for _ in end)]
            labels = [
                token if is_target else IGNORED for token, is_target in zip(ids[1:], learned[1:])
            ]
            samples.append({"input_ids": ids, "labels": [*labels, IGNORED][: len(ids)]})
        return samples

    def _spans(self, record: Record, *, template: Template) -> tuple[str, list[tuple[int, int]]]:
        if "messages" not in record:
            text = record.get("text")
            if not isinstance(text, str):
                raise DataError(
                    f"chat: expected conversations, got keys {sorted(record)}\n    a line has "
                    "`messages`, `conversations`, `instruction` and `output`, `prompt` and "
                    "`completion`, or `text`"
                )
            return text, [(0, len(text))]
        try:
            text, answers = template.answers(record["messages"], tools=record.get("tools"))
        except DataError as error:
            raise DataError(f"{record['where']}: {error}") from None
        if self._trained == "all":
            return text, [(0, len(text))]
        return text, answers[-1:] if self._trained == "last" else answers

    def specimens(self, config: Any) -> list[Sample]:
        """Documents of which some tokens are learned."""
        samples = super().specimens(config)
        for sample in samples:
            ids = sample["input_ids"]
            labels = np.append(ids[1:], IGNORED)
            labels[: len(labels) // 2] = IGNORED
            sample["labels"] = labels
        return samples

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """transformers shifts the labels itself."""
        call = super().user_call(batch)
        labels = call["labels"].new_full(call["labels"].shape, IGNORED)
        labels[:, 1:] = batch["labels"][:, :-1]
        return {**call, "labels": labels}

    def prompts(self) -> tuple[Sequence[str], int]:
        """Those of the recipe, each as what a user says first."""
        prompts, tokens = super().prompts()
        if not self.settings:
            return (), tokens
        template = self._template()
        said = [[{"role": "user", "content": text}] for text in prompts]
        return [template.render(messages, prompt=True) for messages in said], tokens

    def files(self) -> dict[str, str]:
        """The template, for a model that had none."""
        if not self.settings or self.settings["own"]:
            return {}
        return {"chat_template.jinja": self.settings["template"]}

    def next_command(self, *, run: str, recipe: str) -> str:
        """Talk to it."""
        return f"shoal chat {run}"


_WORDS = {
    "answers": "answers only",
    "last": "the last answer of each only",
    "all": "all tokens",
}
