"""Records that a reader makes differently are prepared again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.data import registry, sources


def test_another_version_is_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sources.content_key("digit-scenes")
    package = registry.package("digit-scenes")
    changed = replace(package, version=package.version + 1)
    monkeypatch.setattr(registry, "package", lambda name: changed)
    assert sources.content_key("digit-scenes") != before
