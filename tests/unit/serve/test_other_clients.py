"""The server asked by other people's clients: each says what OpenAI's own client in Python hears.

Each is run where it is installed: `node` with the package `openai` below NODE_PATH, and the Python
that `lm_eval`, `litellm` or `guidellm` on the PATH was installed with.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from served import NAME, Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # some import for a minute
TALK = [{"role": "user", "content": "The river hides the silver key."}]
HOW: dict[str, Any] = {"model": NAME, "messages": TALK, "max_tokens": 20, "seed": 5}
TEXTS = ["An old clock paints a quiet street.", "The river hides the silver key."] * 4
# no client asks anything of a network
ALONE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OPENAI_API_KEY": "none",
    "TOKENIZERS_PARALLELISM": "false",
}


def python_with(command: str, module: str) -> str:
    """The Python that a command on the PATH was installed with; skips where there is none."""
    found = shutil.which(command)
    python = Path(found).parent / "python" if found else None
    if python is None or not python.exists():
        pytest.skip(f"{command} is not on the PATH")
    asked = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True)
    if asked.returncode:
        pytest.skip(f"{python} has no {module}")
    return str(python)


def spoken(command: list[str], *, seconds: float = 280, **environment: str) -> str:
    """What a program prints; it must end well."""
    known = {**os.environ, **ALONE, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=known, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def own_answer(served: Served) -> tuple[str, int]:
    """(text, tokens) by OpenAI's client in Python."""
    made = served.client().chat.completions.create(**HOW)
    assert made.usage is not None
    return made.choices[0].message.content or "", made.usage.completion_tokens


NODE = """
const OpenAI = require("openai").default || require("openai");
const client = new OpenAI({ baseURL: process.argv[1] + "/v1", apiKey: "none", maxRetries: 0 });
const how = JSON.parse(process.argv[2]);
(async () => {
  const models = [];
  for await (const each of client.models.list()) models.push(each.id);
  const whole = await client.chat.completions.create(how);
  let text = "", usage = null;
  const stream = await client.chat.completions.create(
    { ...how, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content || "";
    usage = chunk.usage || usage;
  }
  let problem = null;
  try { await client.chat.completions.create({ ...how, model: "other" }); }
  catch (error) { problem = [error.status, error.code]; }
  console.log(JSON.stringify(
    [models, whole.choices[0].message.content, text, usage.completion_tokens, problem]));
})();
"""


def test_openais_client_for_node(served: Served) -> None:
    if shutil.which("node") is None:
        pytest.skip("there is no node")
    if subprocess.run(["node", "-e", "require('openai')"], capture_output=True).returncode:
        pytest.skip("node has no package openai (npm install openai, and NODE_PATH)")
    text, tokens = own_answer(served)
    found = json.loads(spoken(["node", "-e", NODE, served.url, json.dumps(HOW)]))
    assert found == [[NAME], text, text, tokens, [404, "model_not_found"]]


LITELLM = """
import json, sys
import litellm
url, how = sys.argv[1], json.loads(sys.argv[2])
how["model"] = "openai/" + how["model"]
known = {"api_base": url + "/v1", "api_key": "none"}
whole = litellm.completion(**how, **known)
stream = litellm.completion(**how, **known, stream=True)
pieces = [each.choices[0].delta.content or "" for each in stream]
try:
    litellm.completion(**{**how, "model": "openai/other"}, **known)
    problem = None
except litellm.NotFoundError as error:
    problem = error.status_code
said = [whole.choices[0].message.content, "".join(pieces), whole.usage.completion_tokens, problem]
print("\\n" + json.dumps(said))
"""


def test_litellm(served: Served) -> None:
    python = python_with("litellm", "litellm")
    text, tokens = own_answer(served)
    said = spoken([python, "-c", LITELLM, served.url, json.dumps(HOW)])
    assert json.loads(said.splitlines()[-1]) == [text, text, tokens, 404]


LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI
url, how = sys.argv[1], json.loads(sys.argv[2])
talk = [(each["role"], each["content"]) for each in how["messages"]]
chat = ChatOpenAI(
    base_url=url + "/v1", api_key="none", model=how["model"], seed=how["seed"],
    max_tokens=how["max_tokens"], max_retries=0,
)
whole = chat.invoke(talk)
pieces = [each.content for each in chat.stream(talk)]
print("\\n" + json.dumps([whole.content, "".join(pieces), whole.usage_metadata["output_tokens"]]))
"""


def test_langchain(served: Served) -> None:
    python = python_with("litellm", "langchain_openai")
    text, tokens = own_answer(served)
    said = spoken([python, "-c", LANGCHAIN, served.url, json.dumps(HOW)])
    assert json.loads(said.splitlines()[-1]) == [text, text, tokens]


def test_lm_eval_finds_what_it_finds_with_transformers(served: Served, tmp_path: Path) -> None:
    """The same scores of a task of its own as its own `hf` model has of the same folder."""
    python = python_with("lm_eval", "lm_eval")
    rows = [{"text": text, "end": f" {text.split()[-1]}"} for text in TEXTS]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "small.yaml").write_text(
        "task: small\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.json'}}}}}\n"
        "test_split: test\n"
        "output_type: loglikelihood\n"
        "doc_to_text: 'Our teacher said:'\n"
        "doc_to_target: '{{end}}'\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},"
        " {metric: acc}]\n"
    )
    folder = f"tokenizer={served.folder}"
    asked = f"model={NAME},base_url={served.url}/v1/completions,{folder},tokenized_requests=True"
    found = []
    for number, (model, given) in enumerate(
        [
            ("local-completions", f"{asked},tokenizer_backend=huggingface,num_concurrent=2"),
            ("hf", f"pretrained={served.folder},dtype=float32,{folder}"),
        ]
    ):
        out = tmp_path / str(number)
        words = ["--model", model, "--model_args", given, "--tasks", "small"]
        more = ["--include_path", str(tmp_path), "--output_path", str(out), "--device", "cpu"]
        cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
        spoken([python, "-m", "lm_eval", *words, *more], **cache)
        (file,) = out.rglob("results_*.json")
        found.append(json.loads(file.read_text())["results"]["small"])
    for name in ("perplexity,none", "acc,none"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)
    assert found[0]["perplexity,none"] > 1


def test_guidellm_counts_no_error(served: Served, tmp_path: Path) -> None:
    python = python_with("guidellm", "guidellm")
    out = tmp_path / "report.json"
    words = [
        *("run", "--backend", f"kind=openai_http,target={served.url},model={NAME}"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"),
        *("--tokenizer", f"kind=hf_auto,model={served.folder}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
        *("--output", f"kind=json,path={out}"),
    ]
    guidellm = str(Path(python).parent / "guidellm")
    spoken([guidellm, *words], HF_HOME=str(tmp_path / "home"))
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 6 and totals["errored"] == 0
