"""Rule: keys lie in 0600 files of a 0700 folder, are compared in constant time, never shown."""

from __future__ import annotations

import ast
import json
import os
import re
import stat
from pathlib import Path

import pytest

from shoal.comm.channel import Donor
from shoal.comm.keys import Keys
from shoal.errors import ChannelError

SOURCE = Path(__file__).resolve().parents[2] / "src" / "shoal"
SECRET = re.compile(r"secret|credential|password|public_key|private_key", re.IGNORECASE)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_key_files_are_private_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        Keys.make(tmp_path / "keys")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    for path in (tmp_path / "keys").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keys_of_two_attempts_differ(tmp_path: Path) -> None:
    one, other = Keys.make(tmp_path / "1"), Keys.make(tmp_path / "2")
    secrets = {one.donor.secret, one.receiver.secret, other.donor.secret, other.receiver.secret}
    assert len(secrets) == 4


def test_no_message_shows_a_secret(tmp_path: Path) -> None:
    keys = Keys.make(tmp_path / "keys")
    secrets = [keys.donor.secret.decode(), keys.receiver.secret.decode()]
    (tmp_path / "keys/donor.key").chmod(0o644)
    with pytest.raises(ChannelError) as problem:
        Keys.read(tmp_path / "keys")
    with Donor({}, keys=keys, generation=0) as donor:
        shown = [repr(keys), str(problem.value), repr(donor), donor.address, json.dumps(repr(keys))]
    assert not any(secret in text for secret in secrets for text in shown)


def test_secrets_are_compared_in_constant_time_only() -> None:
    """No `==` on anything that is called a secret; the one comparison uses `hmac`."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and any(
                isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops
            ):
                assert not SECRET.search(ast.unparse(node)), f"{path.name}: {ast.unparse(node)}"
    assert "hmac.compare_digest(" in (SOURCE / "comm/guard.py").read_text()
