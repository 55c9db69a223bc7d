"""GRPO's loss against TRL's own; completions, their keys and rewards."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal.config.load import load_recipe
from shoal.data.prepare import SourceSpec, prepare
from shoal.data.sources import locate, read_records
from shoal.data.stream import Stream
from shoal.errors import ConfigError, DataError, RunError
from shoal.fields import IGNORED
from shoal.launch.refuse import check
from shoal.layout import Share
from shoal.tasks.grpo import Bounds, TokenPolicyLoss
from shoal.tasks.grpo_rollouts import Completions, advantages_of
from shoal.tasks.kinds import create
from shoal.tasks.rewards import answer_digits, exact_answer
from shoal.tasks.task import NO_TOOLS, Output, Tools

OPTIONS: dict[str, Any] = {
    "kind": "grpo",
    "reward": "shoal.tasks.rewards:answer_digits",
    "group": 4,
    "completion_tokens": 5,
    "epochs": 1,
    "clip": 0.2,
    "kl_coefficient": 0.0,
}
LETTERS = "0123456789+=."
END = LETTERS.index(".")


class Letters:
    """One token for each character."""

    def encode(self, text: str) -> Any:
        return SimpleNamespace(ids=[LETTERS.index(each) for each in text])


class Alone:
    """Says digits by a fixed rule of place and last token, and the end now and then."""

    part, num_parts = 0, 1

    def logits(self, batch: Any) -> Any:
        ids, place = batch["input_ids"], np.arange(len(LETTERS))
        seen = (ids * (batch["document_ids"] == 0)).sum(1, keepdims=True)
        logits = np.sin(1.7 * place[None] + seen + batch["position_ids"][:, -1:])
        logits[:, LETTERS.index("+") : END] = -9.0
        return logits.astype(np.float32)

    def write(self, wanted: Any, **asked: Any) -> None:
        """Whole rows are asked for."""

    def text_of(self, ids: Any) -> str:
        return "".join(LETTERS[each] for each in ids)

    def together(self, mine: Any) -> Any:
        return dict(mine)

    def still(self, mine: bool) -> bool:
        return mine

    def tell(self, what: str, done: float | None) -> None:
        """Nobody listens."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    task, tools = create("grpo", options=OPTIONS), Tools(tokenizer=Letters(), sequence_tokens=16)
    prepared = prepare(
        sources=[SourceSpec(source="sum-questions", max_samples=30)],
        encode=lambda records: task.encode(records, tools=tools),
        encode_key="a test",
        sequence_tokens=16,
        packing=False,
        validation_fraction=0.2,
        fields=task.fields,
        out=tmp_path_factory.mktemp("prepared"),
    )
    return Stream(prepared, seed=5, global_batch_samples=3)


def completions(stored: Stream, play: Any = None, **changed: Any) -> Completions:
    task = create("grpo", options={**OPTIONS, **changed}, settings={"end": END})
    found = task.batches(stored, play=play or Alone())
    assert isinstance(found, Completions)
    return found


def made_up(labels_share: float = 0.6) -> tuple[Tensor, nn.Linear, dict[str, Tensor], Tensor]:
    """Hidden states, a head, completions sampled by other weights, the reference's states."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 9, 8, generator=generator, dtype=torch.float64)
    head = nn.Linear(8, 11, bias=False, dtype=torch.float64)
    nn.init.normal_(head.weight, generator=generator)
    labels = torch.randint(11, (6, 9), generator=generator)
    labels[torch.rand(6, 9, generator=generator) > labels_share] = IGNORED
    logs = head(hidden).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].detach()
    old = logs + 0.4 * torch.randn(6, 9, generator=generator)
    gains = torch.randn(6, 1, generator=generator).double().expand(6, 9)
    fields = {"labels": labels, "log_probabilities": old, "advantages": gains}
    return hidden, head, fields, hidden + 0.1 * torch.randn(6, 9, 8, generator=generator)


def plain_loss(
    logs: Tensor, reference: Tensor, fields: dict[str, Tensor], above: float, kl: float
) -> Tensor:
    """Token by token, by the definition."""
    total = logs.new_zeros(())
    for row, place in (fields["labels"] != IGNORED).nonzero().tolist():
        gain, log = fields["advantages"][row, place], logs[row, place]
        ratio = (log - fields["log_probabilities"][row, place]).exp()
        bounded = min(max(ratio.item(), 0.8), 1 + above)
        total = total - (
            ratio * gain if (ratio * gain).item() <= bounded * gain else bounded * gain
        )
        apart = reference[row, place] - log
        total = total + kl * (apart.exp() - apart - 1)
    return total


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_loss_and_its_gradients_are_those_of_plain_torch(kl: float) -> None:
    hidden, head, fields, other = made_up()
    hidden.requires_grad_()
    chosen = fields["labels"].clamp(min=0)[..., None]
    logs, reference = (
        head(each).log_softmax(-1).gather(-1, chosen)[..., 0] for each in (hidden, other)
    )
    wanted = plain_loss(logs, reference.detach(), fields, 0.28, kl)
    loss = TokenPolicyLoss(head, [*head.parameters()], other if kl else None, Bounds(0.2, 0.28, kl))
    found = loss.total(Output(hidden, fields, loss))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    grads = [torch.autograd.grad(each, [hidden, head.weight]) for each in (found, wanted)]
    assert all(torch.allclose(one, two, atol=1e-10) for one, two in zip(*grads))


@pytest.mark.slow
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("above", [0.2, 0.28])
def test_the_loss_and_its_gradients_are_those_of_trl(kl: float, above: float) -> None:
    """TRL's own code, on the log-probabilities that plain torch makes of the same states."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    hidden, head, fields, other = made_up()
    hidden.requires_grad_()
    mask = (fields["labels"] != IGNORED).double()

    def logs_of(states: Tensor) -> Tensor:
        chosen = fields["labels"].clamp(min=0)[..., None]
        return head(states).log_softmax(-1).gather(-1, chosen)[..., 0]

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logs_of(hidden), mask, None),
        beta=kl,
        epsilon_low=0.2,
        epsilon_high=above,
        loss_type="bnpo",  # the mean over the tokens of one batch
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, **k: x, num_processes=1),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": fields["labels"][:, :0],
        "prompt_mask": mask[:, :0],
        "completion_ids": fields["labels"],
        "completion_mask": mask,
        "advantages": fields["advantages"][:, 0],
        "old_per_token_logps": fields["log_probabilities"],
        "ref_per_token_logps": logs_of(other).detach(),
    }
    wanted = GRPOTrainer._compute_loss(cast(Any, trainer), None, inputs) * mask.sum()
    loss = TokenPolicyLoss(
        head, [*head.parameters()], other if kl else None, Bounds(0.2, above, kl)
    )
    found = loss.total(Output(hidden, fields, loss), scale=0.25)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    grads = [torch.autograd.grad(each, [hidden, head.weight]) for each in (found, wanted)]
    for one, theirs in zip(*grads):
        assert theirs.abs().max() > 0.01
        assert torch.allclose(one, theirs, atol=1e-10)
    each = loss.each(Output(hidden, fields, loss)).losses
    assert each.sum().item() == pytest.approx(wanted.item(), rel=1e-12)
    assert (each[mask == 0] == 0).all()


def test_advantages_are_those_of_trl() -> None:
    """As GRPOTrainer scales rewards by their group: torch's deviation and 1e-4."""
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    group = torch.from_numpy(rewards)
    wanted = (group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)
    assert np.allclose(advantages_of(rewards), wanted.numpy(), atol=1e-14)
    assert (advantages_of(np.ones((2, 3))) == 0).all()


def test_rows_are_prompts_with_what_was_said(stored: Stream) -> None:
    found, play = completions(stored), Alone()
    batch, prompts = found.at(7, Share(0, 12)), stored.at(7, Share(0, 3))
    rewards = np.zeros((3, 4))
    for row in range(12):
        prompt = prompts["prompt_ids"][row // 4]
        prompt = prompt[prompt >= 0]
        targets = np.flatnonzero(batch["labels"][row] != IGNORED)
        length = int((batch["document_ids"][row] == 0).sum())
        assert targets.tolist() == list(range(len(prompt) - 1, length))
        said = batch["labels"][row, targets]
        ids = np.concatenate([prompt, said])
        assert np.array_equal(batch["input_ids"][row, :length], ids[:-1])
        assert np.array_equal(batch["position_ids"][row, :length], np.arange(length))
        for place in targets:
            seen = ids[None, : place + 1]
            last = {"position_ids": np.array([[place]]), "document_ids": 0 * seen}
            logits = play.logits({"input_ids": seen, **last})[0].astype(np.float64)
            log = logits[ids[place + 1]] - np.log(np.exp(logits).sum())
            assert batch["log_probabilities"][row, place] == pytest.approx(log, abs=1e-6)
        assert END not in said[:-1] and (said[-1] == END or len(said) == 5)
        question = play.text_of(prompt).rstrip("=").split("+")
        answer = str(sum(map(int, question)))
        text = play.text_of(said).rstrip(".")
        rewards[row // 4, row % 4] = answer_digits(text, {"answer": answer})
    assert rewards.std() > 0 and found.history == [[8, pytest.approx(rewards.mean())]]
    gains = batch["advantages"][:, 0].reshape(3, 4)
    assert np.allclose(gains, advantages_of(rewards), atol=1e-6)


def test_parts_say_together_what_one_says(stored: Stream) -> None:
    whole = completions(stored).at(1, Share(0, 12))
    sums: list[Any] = []

    class Part(Alone):
        num_parts = 2

        def __init__(self, part: int) -> None:
            self.part = part

        def together(self, mine: Any) -> Any:
            sums.append(dict(mine))
            return {name: sum(each[name] for each in sums) for name in mine}

    completions(stored, Part(0)).at(1, Share(0, 12))
    both = completions(stored, Part(1)).at(1, Share(0, 12))
    assert all(np.array_equal(both[name], whole[name]) for name in whole)


def test_epochs_learn_again_and_every_id_is_read_once(stored: Stream) -> None:
    found = completions(stored, epochs=2)
    assert found.num_samples == [8 * stored.num_samples[0]]
    first, again = found.at(0, Share(0, 12)), found.at(1, Share(0, 12))
    assert np.array_equal(first["input_ids"], again["input_ids"]) and len(found.history) == 1
    steps = found.steps_per_epoch
    ids = np.concatenate([found.ids(step)[:, 1] for step in range(steps)])
    assert sorted(ids) == list(range(found.num_samples[0]))
    other = completions(stored, epochs=2)
    with pytest.raises(ValueError, match="step 1 was played by other weights"):
        other.at(1, Share(0, 12))
    other.restore(found.kept())
    back = other.at(1, Share(3, 7))
    assert all(np.array_equal(back[n][:, :8], again[n][3:7, :8]) for n in ("labels", "input_ids"))


def test_a_save_of_another_batch(stored: Stream) -> None:
    found = completions(stored, epochs=2)
    found.at(0, Share(0, 12))
    with pytest.raises(RunError, match="completions of another batch"):
        completions(stored.in_batches_of(6), epochs=2).restore(found.kept())


def test_sums_are_held_out_for_good() -> None:
    """A model has read other sums than it is scored on, and their results are right."""
    asked, held, read = (
        list(read_records(name)) for name in ("sum-questions", "sum-questions-held-out", "sums")
    )
    wanted = [(each["text"], each["answer"]) for each in asked]
    spelled = [(text, (said, f"{int(said):04d}", f"+{said}")) for text, said in wanted]
    assert [each["text"] for each in read] == [a + b for a, three in spelled for b in three]
    questions = {each["text"]: each["answer"] for each in (*asked, *held)}
    assert len(questions) == len(asked) + len(held) == 10_000 and 900 < len(held) < 1100
    for text, answer in questions.items():
        one, other = text.rstrip("=").split("+")
        assert int(one) + int(other) == int(answer)
    with pytest.raises(DataError, match="did you mean 'sum-questions'"):
        locate("sum-question")


def test_rewards_that_come_with_shoal() -> None:
    record = {"answer": "42"}
    assert [exact_answer(each, record) for each in ("42", " 42 ", "4", "421", "")] == [
        1,
        1,
        0,
        0,
        0,
    ]
    found = [answer_digits(each, record) for each in ("42", "41", "4", "423", "", "7")]
    assert found == [1, 0.5, 0.5, 2 / 3, 0, 0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere_at_all:reward", r"task\.reward: 'nowhere_at_all:reward': ModuleNotFoundError"),
        ("json:no_such", r"(?s)task\.reward: json has no function no_such.*def my_reward"),
    ],
)
def test_rewards_that_are_none(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create("grpo", options={**OPTIONS, "reward": path}).learn([], tools=NO_TOOLS)


def test_a_reward_that_is_no_number(
    stored: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_rewards.py").write_text("def none(completion, record): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=r"(?s)odd_rewards:none gave None for .*a finite number"):
        completions(stored, reward="odd_rewards:none").at(0, Share(0, 12))


def test_prompts_that_are_none_or_too_long() -> None:
    task, tools = create("grpo", options=OPTIONS), Tools(tokenizer=Letters(), sequence_tokens=9)
    with pytest.raises(DataError, match=r"(?s)got keys \['answer'\].*text_field"):
        task.encode([{"answer": "1"}], tools=tools)
    with pytest.raises(DataError, match=r"(?s)has 5 tokens.*completion_tokens=5.*=9"):
        task.encode([{"text": "1+22="}], tools=tools)


def test_what_cannot_go_together() -> None:
    with pytest.raises(ConfigError, match="12 completions are no groups of 8"):
        check(load_recipe("arithmetic-grpo", ["train.global_batch_samples=12"]))
    with pytest.raises(ConfigError, match=r"(?s)without its adapter.*kl_coefficient=0"):
        check(load_recipe("arithmetic-grpo", ["task.kl_coefficient=0.1"]))
    with pytest.raises(ConfigError, match=r"task\.reward.*my_module:MyTask"):
        load_recipe("arithmetic-grpo", ["task.reward=evil.py"])
