"""Speech recognition: Whisper writes down what is said in a recording. Score: word error rate.

Shapes: B recordings, M mel bands, F frames, T tokens of the words, L tokens written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import IGNORED, Field, Fields
from shoal.tasks.mel import FRAMES, RATE, SILENT, resampled, spectrogram
from shoal.tasks.pictures import write_table
from shoal.tasks.scores import Examples
from shoal.tasks.task import (
    NO_TOOLS,
    Batch,
    Curve,
    Named,
    Output,
    Record,
    Sample,
    Scores,
    Task,
    Tools,
    Vector,
    real_rows,
    was,
)
from shoal.tasks.text_scores import bytes_to_text, plain_words, text_to_bytes, word_errors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy
    from shoal.tasks.task import Vocabulary

_SHOWN = 12  # misheard recordings in the picture
_WHOLE = 30  # seconds that Whisper has learned to read
_TOKENS_A_SECOND = 8  # written at most


class SpeechRecognition(Task):
    """Cross entropy of the tokens of the words, each after the recording and those before it.

    The encoder reads `longest_seconds` of sound instead of Whisper's 30, in training, evaluation
    and the exported model alike: its cost grows with them, and short recordings are mostly silence
    otherwise. Longer recordings are left out.
    """

    kind = "speech-recognition"
    auto_class = "AutoModelForSpeechSeq2Seq"
    writes_text = True
    target_name = "target tokens"
    curve = Curve("nats per token")
    own_data = "YOUR.csv"
    picture = "misheard.html"

    @property
    def fields(self) -> Fields:
        """`input_features` float32 [M, F], `labels` [T]; the words as bytes of UTF-8."""
        mels = int(self.settings.get("mels", 80))
        return {
            "input_features": Field("float32", (mels, None), fill=SILENT, sequence="frames"),
            "labels": Field("int64", (None,), fill=IGNORED, sequence="target"),
            "reference": Field("uint8", (None,), sequence="reference"),
        }

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"begin": ids before the words, "end": id, "positions": of the encoder, "mels": ...}`.

        Notes how much there is, what has another rate, and what is too long. Raises DataError.
        """
        *begin, end = tools.tokenizer.encode("").ids or [None]
        if not begin or end is None:
            raise DataError(
                "speech-recognition: the tokenizer puts nothing around words, where Whisper's puts "
                "<|startoftranscript|> and <|endoftext|>\n    use a Whisper model as model.path"
            )
        longest, rates = int(self.options.get("longest_seconds", 30)), dict[int, int]()
        total = left_out = 0
        seconds = 0.0
        for record in records:
            audio, rate, _ = _parts(record)
            total += 1
            rates[rate] = rates.get(rate, 0) + 1
            if len(audio) > longest * rate:
                left_out += 1
            else:
                seconds += len(audio) / rate
        if left_out == total:
            raise DataError(
                f"speech-recognition: all {total:,} recordings are longer than {longest} s\n"
                "    cut them, or set task.longest_seconds (at most 30)"
            )
        self.settings = {"begin": begin, "end": end, "positions": longest * FRAMES // 2}
        self.settings |= {"mels": 80, "most": 448}
        self.notes = [f"{total - left_out:,} recordings of {seconds / 60:.1f} minutes together"]
        self.notes += [
            f"{count:,} recordings of {rate:,} samples a second are resampled to {RATE:,}"
            for rate, count in sorted(rates.items())
            if rate != RATE
        ]
        if left_out:
            self.notes.append(
                f"{left_out:,} recordings are longer than {longest} s and left out; "
                "task.longest_seconds takes up to 30"
            )
        return self.settings

    def named_by(self, config: Mapping[str, Any], *, scored: bool) -> dict[str, Any]:
        """How many mel bands the model hears; where it starts to write, and at most how much.

        One that is scored, and reads less sound, has no positions for more. Raises DataError.
        """
        if config.get("model_type") != "whisper":
            raise DataError(
                f"speech-recognition: expected a Whisper model, got {config.get('model_type')!r}\n"
                "    set model.path to one, such as whisper-tiny-en"
            )
        asked, has = int(self.settings["positions"]), int(config.get("max_source_positions", 1500))
        if asked > has:
            raise DataError(
                f"speech-recognition: the model reads {has // 50} s of sound, but "
                f"task.longest_seconds is {asked // 50}\n    set task.longest_seconds={has // 50}"
            )
        most = int(config.get("max_target_positions", 448))
        return {**self.settings, "mels": int(config.get("num_mel_bins", 80)), "most": most}

    def model_settings(self) -> dict[str, Any]:
        """Positions of the encoder: two frames each."""
        return {"max_source_positions": int(self.settings["positions"])}

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"audio": float32 [N], "rate": int, "text": str}`; what is too long has no frames.

        Raises DataError for a record without sound or words.
        """
        mels, frames = int(self.settings["mels"]), 2 * int(self.settings["positions"])
        most = min(int(self.settings["most"]), tools.sequence_tokens or 1 << 30)
        samples = []
        for record in records:
            audio, rate, text = _parts(record)
            # Whisper has learned words with a space before each
            ids = tools.tokenizer.encode(f" {text.strip()}").ids[1:]
            if len(ids) > most:
                ids = [*ids[: most - 1], ids[-1]]
            too_long = len(audio) * FRAMES > frames * rate
            features = np.empty((mels, 0), dtype=np.float32)
            if not too_long:
                features = spectrogram(resampled(audio, rate=rate), mels=mels)[:, :frames]
            samples.append(
                {
                    "input_features": features,
                    "labels": ids,
                    "reference": text_to_bytes(text),
                }
            )
        return samples

    def specimens(self, config: Any) -> list[Sample]:
        """Noise of several lengths, with tokens for words."""
        draw, positions = np.random.default_rng(0), config.max_source_positions
        mels = config.num_mel_bins
        return [
            {
                "input_features": draw.uniform(-1, 1.5, (mels, frames)).astype(np.float32),
                "labels": draw.integers(4, min(config.vocab_size, 4096), size=tokens),
                "reference": text_to_bytes("words"),
            }
            for frames, tokens in ((positions, 5), (2 * positions, 9), (positions // 2, 7))
        ]

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """Spectrograms as the exported processor makes them, silence behind; and the labels."""
        frames = 2 * int(self.settings["positions"])
        return {"input_features": heard(batch["input_features"], frames), "labels": batch["labels"]}

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states of the decoder [B, T, D]; predictions are the tokens written [B, L]."""
        import torch

        from shoal.models.anatomy import head_parameters, hidden_of, logits_of
        from shoal.tasks.decoding import Writing, decoder_inputs, greedy, padded

        config: Any = model.config
        dtype = next(model.parameters()).dtype
        features = heard(batch["input_features"], 2 * config.max_source_positions).to(dtype)
        shown = {name: batch[name] for name in ("sample_ids",) if name in batch}
        shown["input_features"] = features
        shown["decoder_input_ids"] = decoder_inputs(model, batch["labels"])

        def write(vocabulary: Vocabulary | None) -> Tensor:
            begin, end = self.settings["begin"], int(self.settings["end"])
            most = int(self.settings["positions"]) * _TOKENS_A_SECOND * 2 // FRAMES
            most = max(1, min(most, int(self.settings["most"]) - len(begin)))
            tokens = greedy(
                model,
                {"input_features": features},
                begin=torch.tensor([begin], device=features.device).expand(len(features), -1),
                end=end,
                most=most,
                vocabulary=vocabulary,
                forbidden=slice(end + 1, None),  # no words: times, languages
            )
            return padded(tokens, length=most)

        return Output(
            hidden_of(model, shown, step=step, fields=self.fields),
            {"labels": batch["labels"]},
            Writing(logits_of(model), head_parameters(model), write),
        )

    def metrics(self) -> SpeechMetrics:
        """A fresh accumulator."""
        return SpeechMetrics(self)

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Word error rate before and after."""
        earlier = f"{100 * before['word_error_rate']:.1f} % before, " if before else ""
        seconds = after["window_seconds"]
        if before and seconds < _WHOLE:
            earlier = (
                f"{earlier[:-2]} (in windows of {seconds:.0f} s, new to a model that has read 30), "
            )
        return [
            f"word error rate: {earlier}{100 * after['word_error_rate']:.1f} % now, in "
            f"{after['evaluation_words']:,.0f} words (lower case, without punctuation)",
            f"loss: {was(before, 'evaluation_loss', 3)}{after['evaluation_loss']:.3f} now",
        ]

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """A table of what was misheard."""
        write_table([("said", "written", "wrong words"), *shown["rows"]], path=path)

    def files(self) -> dict[str, str]:
        """preprocessor_config.json: how transformers makes features of sound for this model."""
        settings = {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": self.settings["mels"],
            "sampling_rate": RATE,
            "hop_length": RATE // FRAMES,
            "n_fft": 400,
            "chunk_length": int(self.settings["positions"]) * 2 // FRAMES,
            "padding_value": 0.0,
            "return_attention_mask": False,
        }
        return {"preprocessor_config.json": json.dumps(settings, indent=1) + "\n"}


class SpeechMetrics:
    """Sums: loss, its targets, wrong words, words, recordings with a wrong word, recordings."""

    needs_predictions = True

    def __init__(self, task: SpeechRecognition) -> None:
        self._task = task
        self._sums = np.zeros(6)
        self._kept = Examples(_SHOWN)

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count losses [B, T] and tokens written [B, L]."""
        assert scores.predictions is not None, "recordings are scored by what is written"
        for row in np.flatnonzero(real_rows(batch)):
            labels = np.asarray(batch["labels"][row])
            ids = [int(each) for each in scores.predictions[row] if each >= 0]
            written = self._task.tokenizer.decode(ids, skip_special_tokens=True).strip()
            said = bytes_to_text(batch["reference"][row])
            words = plain_words(said)
            wrong = word_errors(plain_words(written), words)
            loss = float(scores.losses[row].double().sum())
            self._sums += [loss, (labels != IGNORED).sum(), wrong, len(words), wrong > 0, 1]
            if wrong and self._kept.wants(batch, int(row)):
                self._kept.keep(batch, int(row), [said, written, f"{wrong} of {len(words)}"])

    def vector(self) -> Vector:
        """All sums (see the class)."""
        return self._sums.copy()

    def result(self, vector: Vector | None = None) -> Named:
        """Mean loss per target; errors per word said; share of recordings with an error."""
        sums = [float(each) for each in (self._sums if vector is None else vector)]
        loss, targets, wrong, words, misheard, recordings = sums
        return {
            "evaluation_loss": loss / (targets or math.nan),
            "word_error_rate": wrong / (words or math.nan),
            "sentence_error_rate": misheard / (recordings or math.nan),
            "window_seconds": int(self._task.settings["positions"]) * 2 / FRAMES,
            "evaluation_words": words,
            "evaluation_targets": targets,
        }

    @property
    def examples(self) -> Sequence[Sequence[Any]]:
        """The first misheard ones: said, written, wrong words."""
        return self._kept.found

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Rows of a table."""
        return {"rows": [example for _, _, example in examples[:_SHOWN]]}


def heard(features: Tensor, frames: int) -> Tensor:
    """Spectrograms [B, M, F] with silence behind each, up to `frames`: as Whisper's extractor.

    Silence is 8 (in log10 of the power; 2 as it is scaled) below the loudest, or the floor.
    """
    from torch.nn.functional import pad

    features = pad(features[..., :frames], (0, max(0, frames - features.shape[-1])), value=SILENT)
    silence = (features.amax(dim=(1, 2), keepdim=True) - 2.0).clamp(min=-1.5)
    return features.where(features > SILENT, silence)


def _parts(record: Record) -> tuple[Any, int, str]:
    audio, rate, text = record.get("audio"), record.get("rate"), record.get("text")
    if not isinstance(audio, np.ndarray) or not isinstance(rate, int):
        got = f"keys {sorted(record)}" if audio is None else repr(audio)[:80]
        raise DataError(
            f"speech-recognition: expected sound under 'audio', got {got}\n"
            "    name a table with the columns audio, a .wav file in its folder or below, and text"
        )
    if not isinstance(text, str) or not plain_words(text):
        raise DataError(
            f"speech-recognition: expected the words of a recording under 'text', got {text!r}\n"
            "    write down what is said, or remove the recording from the table"
        )
    return audio, rate, text
