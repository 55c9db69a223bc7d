"""The desk: answers questions from the articles, remembers conversations, hands over to people."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from apps.command import Conflict, Missing
from apps.served import NotServed, Served
from apps.state import Row
from apps.support.articles import NAME, Article
from apps.support.search import (
    FEW,
    MARGIN,
    PRECISION,
    TITLE,
    Index,
    Threshold,
    right_of,
    taken_out,
)
from apps.support.store import OPEN, SOLVED, TAKEN, Store
from shoal import UserError

MOST_CHARACTERS = 2000
"""Of a question; what is longer is refused."""

_READ = 300  # characters of a question that the encoder reads
_PATIENCE_SECONDS = 10.0  # with the encoder, before words alone have to do
_OTHERS = 3
_REPLY_TOKENS = 120
_ASKED = 1500  # questions that the threshold is found with, at most
_NAMES = re.compile(r"\d[\d.,:/%-]*|[A-Z][\w'-]*|\w+[A-Z]\w*")
_BEGINNINGS = set(
    re.findall(
        r"\w+",
        "a an and as at by click do for from go if in it no note of on once open or select so the "
        "then there these this to use when with yes you your",
    )
)


@dataclass(frozen=True)
class Answer:
    """What a customer is shown: a passage with its article, or nothing."""

    known: bool
    sure: float = 0.0
    id: str = ""
    title: str = ""
    link: str = ""
    passage: str = ""
    """As it stands in the article."""
    said: str = ""
    """The passage in other words, by a chat model; empty where there is none, or it said more."""
    others: list[dict[str, str]] = field(default_factory=list)
    by_words_alone: bool = False
    """The encoder did not answer in time."""


@dataclass(frozen=True)
class Prefixes:
    """What the encoder wants before questions and texts."""

    query: str = ""
    text: str = ""

    @classmethod
    def of(cls, model: str) -> Prefixes:
        """Those that a run was trained with; none of other folders."""
        path = Path(model) / "config.yaml"
        if not path.is_file():
            return cls()
        task = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("task") or {}
        return cls(str(task.get("query_prefix") or ""), str(task.get("text_prefix") or ""))


class Desk:
    """Answers while its index is rebuilt: a new one takes the old one's place when it is whole."""

    def __init__(
        self,
        store: Store,
        *,
        encoder: Served | None = None,
        model: str = "",
        prefixes: Prefixes | None = None,
        chat: Served | None = None,
        say: Callable[[str], None] = lambda line: None,
        join_seconds: float = 2.0,
    ) -> None:
        self.store, self._encoder, self._model, self._chat = store, encoder, model, chat
        self._prefixes, self._say, self._join = prefixes or Prefixes(), say, join_seconds
        self._timers: dict[str, threading.Timer] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._wanted = self._built = 0
        self._ended = False
        self.threshold = Threshold()
        noted = store.noted("threshold")
        if noted:
            self.threshold = Threshold(**json.loads(noted))
        self.index = self._make_index()
        threading.Thread(target=self._rebuild, daemon=True).start()

    # the index

    def _make_index(self) -> Index:
        articles = self.store.articles()
        texts = [self._prefixes.text + each.beginning for each in articles]
        return Index(articles, self._vectors(texts) if articles else None)

    def _vectors(self, texts: Sequence[str]) -> NDArray[np.float32] | None:
        """Of texts, those that are not known by the encoder."""
        if self._encoder is None:
            return None
        found = self.store.vectors(texts, model=self._model)
        missing = [n for n, each in enumerate(found) if each is None]
        for first in range(0, len(missing), 256):
            part = missing[first : first + 256]
            if len(missing) > 256:
                self._say(f"reading articles: {first:,} of {len(missing):,}")
            made = self._encoder.embeddings([texts[n] for n in part])
            self.store.keep_vectors([texts[n] for n in part], made, model=self._model)
            for n, vector in zip(part, made):
                found[n] = vector
        return np.stack(found)  # type: ignore[arg-type]

    def _rebuild(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted > self._built or self._ended)
                if self._ended:
                    return
                wanted = self._wanted
            try:
                self.index = self._make_index()
            except NotServed as error:
                self._say(f"the index stays as it was, and is tried again: {error}")
                continue
            except UserError as error:
                self._say(f"the index stays as it was: {error}")
            with self._changed:
                self._built = wanted
                self._changed.notify_all()

    def put(self, id: str, *, title: str, text: str, link: str) -> dict[str, Any]:
        """Add or replace an article; it can be found when this returns. Raises UserError."""
        if not NAME.fullmatch(id) or ".." in id:
            raise UserError(f"{id[:80]!r}: an article is called by letters, digits, . / - and _")
        if not text.strip() or not title.strip():
            raise UserError(f"{id}: expected a title and a text, got an empty one; nothing changed")
        if link and not re.match(r"https?://|/", link):
            raise UserError(
                f"{id}: expected a link that begins with https:// or /, got {link[:40]!r}"
            )
        self.store.put([Article(id, title, text, link)])
        return {"id": id, "articles": self._swapped()}

    def remove(self, id: str) -> dict[str, Any]:
        """Take an article out. Raises Missing."""
        if not self.store.rows("delete from articles where id = ? returning id", id):
            raise Missing(f"there is no article {id[:80]!r}")
        return {"id": id, "articles": self._swapped()}

    def _swapped(self) -> int:
        with self._changed:
            self._wanted += 1
            mine = self._wanted
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._built >= mine or self._ended, timeout=60)
        return len(self.index.articles)

    def calibrate(
        self, pairs: Sequence[tuple[str, str]], *, precision: float = PRECISION
    ) -> Threshold:
        """Find the threshold on (question, id of the right article), and keep it.

        Raises UserError where too few questions have an article that is here.
        """
        index = self.index
        questions, right = right_of(index, pairs)
        kept = np.flatnonzero(right.any(axis=1))[:_ASKED]
        if len(kept) < FEW:
            raise UserError(
                f"--questions: {len(kept)} of {len(questions)} questions name an article that is "
                f"here; expected {FEW} at least, for a threshold that means something"
            )
        asked = [questions[n] for n in kept]
        vectors = self._vectors([self._read(each) for each in asked])
        gone = taken_out([each.id for each in index.articles]) & right[kept].any(axis=0)
        signs: list[dict[str, float]] = []
        hits = np.zeros(len(asked), dtype=bool)
        for n, question in enumerate(asked):
            scores = index.scores(question, None if vectors is None else vectors[n])
            scores[gone] = scores.min()
            place = int(scores.argmax())
            hits[n] = right[kept[n], place]
            signs.append(index.signs(scores, place, question))
        self.threshold = Threshold.of(
            {sign: np.array([each[sign] for each in signs]) for sign in (MARGIN, TITLE)},
            right=hits,
            possible=(right[kept] & ~gone).any(axis=1),
            precision=precision,
        )
        self.store.note("threshold", self.threshold.to_json())
        return self.threshold

    def _read(self, question: str) -> str:
        return self._prefixes.query + question[:_READ]

    # answers

    def answer(self, question: str) -> Answer:
        """The passage that answers a question, if it is known surely enough. Raises UserError."""
        question, index = question.strip(), self.index
        if not question:
            raise UserError("the question is empty")
        if len(question) > MOST_CHARACTERS:
            raise UserError(
                f"a question has at most {MOST_CHARACTERS:,} characters, this one has "
                f"{len(question):,}; say what you want to know in a few sentences"
            )
        if not index.articles:
            return Answer(known=False)
        vector, alone = None, False
        if self._encoder is not None:
            try:
                made = self._encoder.embeddings([self._read(question)], patience=_PATIENCE_SECONDS)
                vector = made[0]
            except NotServed:
                alone = True
        scores = index.scores(question, vector)
        best = index.best(scores, count=1 + _OTHERS)
        sure = index.signs(scores, best[0], question)[self.threshold.sign]
        others = [
            {"id": each.id, "title": each.title, "link": each.link}
            for each in (index.articles[place] for place in best)
        ]
        strange = vector is None and not index.knows(question)
        if strange or sure < self.threshold.value:
            return Answer(known=False, sure=sure, others=others[:_OTHERS], by_words_alone=alone)
        article = index.articles[best[0]]
        passage = index.passage(article, question)
        said = self._rephrased(question, passage) if self._chat else ""
        found = Answer(True, sure, article.id, article.title, article.link, passage, said)
        return Answer(**{**asdict(found), "others": others[1:], "by_words_alone": alone})

    def _rephrased(self, question: str, passage: str) -> str:
        """The passage as an answer; empty where the model said what does not stand there."""
        assert self._chat is not None
        asked = (
            f"Answer the question with this text only.\n\nText: {passage}\n\nQuestion: {question}"
        )
        try:
            reply = self._chat.chat([{"role": "user", "content": asked}], tokens=_REPLY_TOKENS)
        except (NotServed, UserError):
            return ""
        return reply.strip() if stands_in(reply, passage) else ""

    # conversations and hand-offs

    def hear(self, conversation: str, *, text: str) -> dict[str, Any]:
        """Take a message; what one person writes within `join_seconds` is answered together."""
        if not text.strip() or len(text) > MOST_CHARACTERS:
            raise UserError(f"expected a message of 1 to {MOST_CHARACTERS:,} characters")
        number = self.store.say(conversation, who="customer", text=text.strip())
        with self._lock:
            before = self._timers.pop(conversation, None)
            if before is not None:
                before.cancel()
            timer = threading.Timer(self._join, self._reply, args=(conversation,))
            timer.daemon = True
            self._timers[conversation] = timer
            timer.start()
        return {"number": number}

    def _reply(self, conversation: str) -> None:
        with self._lock:
            self._timers.pop(conversation, None)
        if self.store.handoff(conversation):
            return  # a person answers
        lines = self.store.lines(conversation)
        last = max((n for n, each in enumerate(lines) if each["who"] != "customer"), default=-1)
        asked = "\n".join(each["text"] for each in lines[last + 1 :])
        if not asked:
            return
        try:
            told = asdict(self.answer(asked))
        except UserError as error:  # together they are too long
            told = {"known": False, "refused": str(error)}
        said = json.dumps(told, ensure_ascii=False)
        self.store.say(conversation, who="service", text=said, article=told.get("id", ""))

    def hand_off(self, conversation: str) -> Row | None:
        """Ask for a person; asking again changes nothing. Raises Missing."""
        asked = [e["text"] for e in self.store.lines(conversation) if e["who"] == "customer"]
        if not asked:
            raise Missing("nothing was asked in this conversation yet")
        return self.store.open_handoff(conversation, question=asked[-1])

    def take(self, number: int, *, person: str) -> dict[str, Any]:
        """A person takes a hand-off. Raises Conflict where another has it, or it is solved."""
        return self._moved(number, state=TAKEN, person=person[:80])

    def solve(self, number: int) -> dict[str, Any]:
        """It is solved; what the person said becomes a draft of an article. Raises Conflict."""
        return self._moved(number, state=SOLVED)

    def _moved(self, number: int, *, state: str, person: str = "") -> dict[str, Any]:
        found = self.store.move(number, state=state, person=person)
        if found is None:
            needed = OPEN if state == TAKEN else TAKEN
            raise Conflict(f"hand-off {number} is not {needed}; look at the queue again")
        return found

    def reply(self, number: int, *, text: str) -> dict[str, Any]:
        """What the person says to the customer. Raises Conflict where nobody took it."""
        found = [each for each in self.store.handoffs() if each["number"] == number]
        if not found or found[0]["state"] != TAKEN:
            raise Conflict(f"hand-off {number} is not {TAKEN}; take it first")
        if not text.strip():
            raise UserError("the message is empty")
        self.store.say(found[0]["conversation"], who="person", text=text.strip())
        return found[0]

    def publish(self, number: int, *, id: str, title: str, text: str) -> dict[str, Any]:
        """Make an article of a draft, as the person has edited it. Raises Missing."""
        if all(each["number"] != number for each in self.store.drafts()):
            raise Missing(f"there is no draft {number}")
        made = self.put(id, title=title, text=text, link="")
        self.drop_draft(number)
        return made

    def drop_draft(self, number: int) -> Row:
        """Take a draft out. Raises Missing."""
        found = self.store.drop_draft(number)
        if found is None:
            raise Missing(f"there is no draft {number}")
        return found

    def close(self) -> None:
        """End what runs beside."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for each in list(self._timers.values()):
            each.cancel()


def stands_in(reply: str, passage: str) -> bool:
    """Whether every number and name of a reply stands in the passage, and it is not empty.

    A name is a word with a capital letter; of words that begin sentences, common ones are none.
    Texts in scripts without capitals are not checked, so they do not pass.
    """
    if not reply.strip() or re.search(r"[^\x00-\u024f\u2010-\u2027]", reply):
        return False
    known = {word.strip(".,:/%-'") for word in re.findall(r"[\w.,:/%'-]+", passage.casefold())}
    named = {each.casefold().strip(".,:/%-'") for each in _NAMES.findall(reply)}
    return named - _BEGINNINGS <= known
