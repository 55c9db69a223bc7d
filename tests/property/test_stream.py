"""The promise of the data: one global batch per step, whoever reads it and however it is split."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.mixture import LONGEST_PERIOD, Mixture
from shoal.data.permutation import key_of, permute
from shoal.data.prepare import Prepared, SourceSpec, prepare
from shoal.data.stream import Evaluation, Stream
from shoal.layout import Share, split_evenly

TOKENS = 64


def bytes_as_ids(records: list[dict[str, str]]) -> list[dict[str, list[int]]]:
    """A real encoding without a tokenizer: UTF-8 bytes, and 256 at the end of a document."""
    return [{"input_ids": [*record["text"].encode(), 256]} for record in records]


def prepare_texts(folder: Path, *, counts: dict[str, int], weights: dict[str, float]) -> Prepared:
    """Sources of `counts` documents of 1 to 400 tokens, the lengths drawn from a fixed seed."""
    random = np.random.default_rng(7)
    specs = []
    for name, count in counts.items():
        lines = [
            '{"text": "' + "".join(random.choice(list("abcdefgh "), size=size)) + '."}'
            for size in random.integers(1, 400, size=count)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        specs.append(SourceSpec(source=str(path), weight=weights[name]))
    return prepare(
        sources=specs,
        encode=bytes_as_ids,
        encode_key="bytes",
        sequence_tokens=TOKENS,
        packing=True,
        validation_fraction=0.1,
        out=folder / "prepared",
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("one")
    return prepare_texts(folder, counts={"a": 60}, weights={"a": 1.0})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("mixed")
    return prepare_texts(folder, counts={"a": 60, "b": 25}, weights={"a": 0.7, "b": 0.3})


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size=size, key=key)), np.arange(size))


@given(size=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permutation_of_any_size_stays_inside_and_distinct(
    size: int, key: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    samples = permute(positions, size=size, key=key)
    assert samples.min() >= 0 and samples.max() < size
    assert len(set(samples.tolist())) == len(positions)
    alone = [int(permute([position], size=size, key=key)[0]) for position in positions]
    assert samples.tolist() == alone


def test_permutation_looks_shuffled() -> None:
    """Places of neighbours are unrelated: the correlation of n independent pairs has a standard
    deviation of 1/sqrt(n) = 0.01, so 0.05 is five of them, and the input is fixed."""
    samples = permute(np.arange(10_000), size=10_000, key=key_of("order", 0))
    assert abs(np.corrcoef(samples[1:], samples[:-1])[0, 1]) < 0.05
    assert abs(np.corrcoef(samples, np.arange(10_000))[0, 1]) < 0.05
    assert np.mean(samples == permute(np.arange(10_000), size=10_000, key=1)) < 0.01


def test_permutation_refuses_positions_outside() -> None:
    with pytest.raises(ValueError, match=r"positions must lie in 0\.\.4"):
        permute([5], size=5, key=0)


@given(
    step=st.integers(0, 10**6),
    replicate=st.integers(1, 8),
    size=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_any_replicate_degree_and_micro_batch_reads_the_same_global_batch(
    mixed: Prepared, step: int, replicate: int, size: int, seed: int
) -> None:
    stream = Stream(mixed, seed=seed, global_batch_samples=24)
    whole = stream.at(step, Share(0, 24))
    parts = []
    for index in range(replicate):
        share = split_evenly(24, replicate, index, multiple=size)
        for start in range(share.start, share.stop, size):
            parts.append(stream.at(step, Share(start, start + size)))
    for name, array in whole.items():
        assert np.array_equal(array, np.concatenate([part[name] for part in parts])), name
    pairs = np.stack([whole["source_ids"], whole["sample_ids"]], axis=1)
    assert np.array_equal(pairs, stream.ids(step))


@given(
    batch=st.integers(1, 40),
    pattern=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_every_sample_once_per_epoch_over_restarts_at_other_degrees(
    one: Prepared, batch: int, pattern: list[tuple[int, int]]
) -> None:
    """Each segment of a run has its own degree; a new stream is opened at every restart."""
    size = one.sources[0].num_samples("train")
    read: list[int] = []
    step = segment = 0
    while len(read) < 2 * size:
        steps, replicate = pattern[segment % len(pattern)]
        stream = Stream(one.directory, seed=3, global_batch_samples=batch)
        for _ in range(steps):
            for index in range(replicate):
                share = split_evenly(batch, replicate, index)
                read += stream._ids(step, share=share)[:, 1].tolist()
            step += 1
        segment += 1
    assert len(set(read)) == len(read), "an id is unique over the whole run"
    for epoch in range(2):
        indices = sorted(sample % size for sample in read[epoch * size : (epoch + 1) * size])
        assert indices == list(range(size))
    assert stream.state(step) == {"a.jsonl": step * batch}


def test_epochs_and_seeds_have_their_own_order(one: Prepared) -> None:
    size = one.sources[0].num_samples("train")
    stream = Stream(one, seed=0, global_batch_samples=size)
    first, second = stream.ids(0)[:, 1], stream.ids(1)[:, 1] - size
    other = Stream(one, seed=1, global_batch_samples=size).ids(0)[:, 1]
    assert sorted(first) == sorted(second) == sorted(other) == list(range(size))
    assert not np.array_equal(first, second) and not np.array_equal(first, other)


@given(
    weights=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    scale=st.sampled_from([1, 0.1, 0.25]),
    slots=st.integers(0, 10**12),
)
@settings(deadline=None)
def test_mixture_is_exact_and_its_state_is_closed_form(
    weights: list[int], scale: float, slots: int
) -> None:
    mixture = Mixture([weight * scale for weight in weights])
    total = sum(weights)
    # Weights such as 0.1 x 3 are not the float 0.3; they still count as what was meant.
    assert [Fraction(count, mixture.period) for count in mixture.per_period] == [
        Fraction(weight, total) for weight in weights
    ]
    assert sum(mixture.before(slots)) == slots
    for weight, count in zip(weights, mixture.before(slots)):
        assert abs(count - Fraction(slots * weight, total)) <= len(weights)
    if slots < 10**12 - 1:
        source, running = mixture.at(np.arange(slots, slots + 50))
        before = mixture.before(slots)
        for chosen, number in zip(source, running):
            assert number == before[chosen]
            before[chosen] += 1
        assert before == mixture.before(slots + 50)


def test_mixture_whole_numbers_are_exact_over_each_period() -> None:
    mixture = Mixture([0.7, 0.2, 0.1])
    assert (mixture.per_period, mixture.period) == ([7, 2, 1], 10)
    source, _ = mixture.at(np.arange(1000, 1010))
    assert Counter(source.tolist()) == {0: 7, 1: 2, 2: 1}


@pytest.mark.parametrize("weights", [[0.123457, 0.654321], [1e-9, 1.0], [2**0.5, 3**0.5, 1.0]])
def test_mixture_of_awkward_weights_is_rounded_to_a_short_period(weights: list[float]) -> None:
    mixture = Mixture(weights)
    assert mixture.period <= LONGEST_PERIOD
    assert min(mixture.per_period) >= 1, "no source is left out"
    for count, weight in zip(mixture.per_period, weights):
        assert abs(count / mixture.period - weight / sum(weights)) <= 1 / LONGEST_PERIOD


def test_mixture_refuses_weights_that_are_not_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Mixture([1.0, 0.0])


def test_every_source_of_a_mixture_is_read_once_per_epoch_of_its_own(mixed: Prepared) -> None:
    stream = Stream(mixed, seed=0, global_batch_samples=16)
    pairs = np.concatenate([stream.ids(step) for step in range(3 * stream.steps_per_epoch)])
    for number, size in enumerate(stream.num_samples):
        ids = pairs[pairs[:, 0] == number, 1]
        assert len(set(ids.tolist())) == len(ids)
        whole = len(ids) // size * size
        assert set(range(whole)) <= set(ids.tolist())
        assert whole >= size


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_a_worker_reads_only_its_part_of_the_bytes(one: Prepared, parts: int) -> None:
    """Over one epoch: at most 1.1/N of the files that hold the part, and one row beside.

    What is read more than once: each row's last target is the next row's first token (1/64 of the
    tokens here), and the offsets of a document that two rows share (2 numbers a row).
    """
    folder = one.sources[0].directory
    kinds = ("input_ids", "tokens.offsets", "rows")
    total = sum((folder / f"train.{kind}").stat().st_size for kind in kinds)
    size = one.sources[0].num_samples("train")
    row_bytes = 4 * (TOKENS + 1) + 8 * 8
    for index in range(parts):
        stream = Stream(one, seed=0, global_batch_samples=size)
        stream.at(0, split_evenly(size, parts, index))
        assert stream.bytes_read <= 1.1 / parts * total + row_bytes
        assert stream.bytes_read >= 0.8 / parts * total


def test_one_step_reads_one_share(one: Prepared) -> None:
    stream = Stream(one, seed=0, global_batch_samples=8)
    stream.at(0, Share(2, 4))
    row_bytes = 4 * (TOKENS + 1) + 16
    # Two rows, and per row the offsets of the documents in it: at most one per token.
    assert 2 * row_bytes <= stream.bytes_read <= 2 * (row_bytes + 8 * (TOKENS + 2))


@given(parts=st.integers(1, 7), batch=st.integers(1, 9), samples=st.none() | st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_evaluation_reads_each_sample_once_however_it_is_split(
    mixed: Prepared, parts: int, batch: int, samples: int | None
) -> None:
    evaluation = Evaluation(mixed, batch_samples=batch, samples=samples)
    seen: Counter[tuple[int, int]] = Counter()
    targets = 0
    for number in range(evaluation.num_batches(parts)):
        for part in range(parts):
            got = evaluation.at(number, part=part, parts=parts)
            assert got["input_ids"].shape == (batch, TOKENS)
            real = got["sample_ids"] >= 0
            seen.update(zip(got["source_ids"][real].tolist(), got["sample_ids"][real].tolist()))
            assert np.all(got["labels"][~real] == -100)
            targets += int((got["labels"] != -100).sum())
    assert set(seen.values()) == {1}
    assert len(seen) == len(evaluation)
    if samples is None:
        assert targets == mixed.description["parts"]["validation"]["targets"]


def test_step_one_million_is_answered_at_once(mixed: Prepared) -> None:
    """No recurrence: the work does not depend on the step, seen by counting array elements."""
    stream = Stream(mixed, seed=0, global_batch_samples=16)
    far = stream.ids(10**12)
    assert far.shape == (16, 2)
    assert sum(stream.state(10**12).values()) == 16 * 10**12


def test_a_share_outside_the_batch_is_refused(one: Prepared) -> None:
    with pytest.raises(ValueError, match="outside the global batch of 8"):
        Stream(one, seed=0, global_batch_samples=8).at(0, Share(4, 9))
