"""Prints, for sh, the places where pip looks for packages as settings of uv, which reads none.

A machine whose pip was told a mirror, a folder of wheels or constraints would else be asked twice.
Settings of uv that are there already stay.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
}
COMMAS = {"UV_FIND_LINKS"}
"""Settings of uv that are a list with commas; the others have blanks, as pip's."""


def settings(listed: str) -> dict[str, str]:
    """uv's settings from what `pip config list` says: `global.find-links='/wheels'`."""
    found: dict[str, str] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        name = NAMES.get(key.rpartition(".")[2])
        if name is None or not value:
            continue
        words = value.strip("'\"").replace("\\n", " ").split()
        found[name] = (",", " ")[name not in COMMAS].join(words)
    if "UV_INDEX" in found:  # pip takes the best version of all its indexes
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found


def main() -> None:
    """Ask pip, print assignments."""
    asked = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    for name, value in settings(listed).items():
        if name not in os.environ:
            print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
