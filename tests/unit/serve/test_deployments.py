"""The files of examples/deploy: they parse, and what they ask of the server is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from shoal.config.serve import serve_settings

DEPLOY = Path(__file__).parents[3] / "examples" / "deploy"


def entry() -> list[str]:
    """Settings of the Dockerfile's command."""
    found = re.search(r'^ENTRYPOINT \["shoal", "serve", "/model", (.*)\]$', dockerfile(), re.M)
    assert found is not None
    return re.findall(r'"([^"]+)"', found[1])


def dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text()


def test_the_image_serves_with_settings_that_are_known() -> None:
    settings = serve_settings(entry())
    assert settings.host == "0.0.0.0" and settings.keys == "/keys"
    copied = re.findall(r"^COPY (.*) \S+$", dockerfile(), re.M)
    for name in " ".join(copied).split():
        assert (DEPLOY.parents[1] / name).exists(), name
    assert re.search(r"^USER (?!root)", dockerfile(), re.M), "it does not run as root"


def test_compose_adds_settings_that_are_known() -> None:
    tree = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = tree["services"]["shoal"]
    serve_settings([*entry(), *service["command"]])
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert service["ports"] == ["127.0.0.1:8000:8000"]


def test_kubernetes_probes_routes_that_are_there() -> None:
    parts: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    deployment, service = parts
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    serve_settings([*entry(), *container["args"]])
    probed = {container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    assert probed == {"/health", "/ready"}
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["spec"]["volumes"]}
