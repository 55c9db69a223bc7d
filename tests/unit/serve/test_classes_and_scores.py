"""Classes, scores and embeddings over HTTP; transformers' own models are the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from served import serving, write_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from shoal.config.serve import serve_settings
from shoal.launch.pool import WorkerPool

TEXTS = ["The river hides the silver key.", "A fox", "The key of the old tower is lost."]


def write_bert(folder: Path, *, classes: int | None) -> PreTrainedTokenizerFast:
    """A BERT of two layers with random weights; `classes` None: without a head."""
    write_model(folder)
    for each in folder.glob("*.safetensors"):
        each.unlink()
    (folder / "generation_config.json").unlink(missing_ok=True)
    names = {n: f"class {n}" for n in range(classes or 2)}
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        id2label=names,
    )
    torch.manual_seed(0)
    kind = BertModel if classes is None else BertForSequenceClassification
    model = kind(config).eval()
    if classes is not None:
        torch.nn.init.normal_(model.classifier.weight)  # so that texts differ
    model.save_pretrained(folder)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def logits_of(folder: Path, tokenizer: Any, *texts: str) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(*texts, return_token_type_ids=True, return_tensors="pt")).logits[0]


def post(url: str, route: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{route}", json={"model": "bert", **body}, timeout=60)


def test_classes_are_those_of_transformers(pool: WorkerPool, tmp_path: Path) -> None:
    tokenizer = write_bert(tmp_path / "bert", classes=3)
    settings = serve_settings(["port=0", "threads=1"])
    for served in serving(tmp_path / "bert", settings=settings, pool=pool):
        answer = post(served.url, "/classify", input=TEXTS).json()
        assert answer["object"] == "list" and answer["model"] == "bert"
        for text, each in zip(TEXTS, answer["data"], strict=True):
            wanted = logits_of(tmp_path / "bert", tokenizer, text).softmax(-1)
            # float32 sums of 32 numbers in another order
            assert torch.allclose(torch.tensor(each["probs"]), wanted, atol=1e-5)
            assert each["label"] == f"class {int(wanted.argmax())}" and each["num_classes"] == 3
        count = sum(len(tokenizer(each)["input_ids"]) for each in TEXTS)
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == count
        alone = [post(served.url, "/classify", input=each).json()["data"][0] for each in TEXTS]
        assert [each["probs"] for each in alone] == [each["probs"] for each in answer["data"]]
        for route, body in (
            ("/v1/completions", {"prompt": "A"}),
            ("/v1/embeddings", {"input": "A"}),
        ):
            refused = post(served.url, route, **body)
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "wrong_kind_of_model"
            assert "is asked at /classify" in refused.json()["error"]["message"]
        refused = post(served.url, "/score", text_1="A", text_2="B")
        assert "has 3 classes" in refused.json()["error"]["message"]
        refused = post(served.url, "/classify", input="The river " * 100)
        assert refused.status_code == 400
        assert "1 to 64 tokens" in refused.json()["error"]["message"]


@pytest.mark.parametrize("classes", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_scores_of_pairs(pool: WorkerPool, tmp_path: Path, classes: int | None) -> None:
    """One output reads both texts at once; a model without a head gives each an embedding."""
    tokenizer = write_bert(tmp_path / "bert", classes=classes)
    settings = serve_settings(["port=0", "threads=1"])
    for served in serving(tmp_path / "bert", settings=settings, pool=pool):
        answer = post(served.url, "/score", text_1=TEXTS[0], text_2=TEXTS[1:]).json()
        found = [each["score"] for each in answer["data"]]
        if classes == 1:
            pairs = [logits_of(tmp_path / "bert", tokenizer, TEXTS[0], each) for each in TEXTS[1:]]
            wanted = torch.stack(pairs)[:, 0].sigmoid()
        else:
            model = AutoModel.from_pretrained(tmp_path / "bert").eval()
            with torch.no_grad():
                states = [
                    model(**tokenizer(each, return_tensors="pt")).last_hidden_state[0].mean(0)
                    for each in TEXTS
                ]
            wanted = torch.cosine_similarity(states[0][None], torch.stack(states[1:]), dim=-1)
            made = post(served.url, "/v1/embeddings", input=TEXTS[0]).json()["data"][0]
            unit = states[0] / states[0].norm()
            assert torch.allclose(torch.tensor(made["embedding"]), unit, atol=1e-5)
        assert torch.allclose(torch.tensor(found), wanted, atol=1e-5)
        again = post(served.url, "/score", text_1=[TEXTS[0]] * 2, text_2=TEXTS[1:]).json()
        assert [each["score"] for each in again["data"]] == found
        wrong = post(served.url, "/score", text_1=TEXTS, text_2="A")
        assert wrong.status_code == 400
        assert "as many as text_2" in wrong.json()["error"]["message"]
