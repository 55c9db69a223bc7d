"""Data, tokenizer and model for hosts that lack them: from the caches of those that have them.

The coordinator has all of it, and says what belongs into each folder; hosts fetch from each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from shoal.data.prepare import open_prepared
from shoal.data.storage import contents_of
from shoal.engine.job import Inputs
from shoal.launch import calls
from shoal.launch.remote_site import RemoteSite
from shoal.units import format_bytes

Event = tuple[str, dict[str, Any]]


def folders_of(inputs: Inputs) -> list[Path]:
    """All that workers read from. Raises DataError for prepared data that is damaged."""
    prepared = open_prepared(inputs.data_directory)
    folders = [each.directory for each in (*prepared.sources, *prepared.evaluated)]
    named = (
        inputs.data_directory,
        inputs.tokenizer_directory,
        inputs.model_directory,
        inputs.adapter_directory,
        inputs.companion_directory,
    )
    return list(dict.fromkeys([*folders, *(Path(name) for name in named if name is not None)]))


class Giving:
    """Answers sites whose hosts lack a folder, and counts what they were given."""

    def __init__(self, sites: Sequence[RemoteSite]) -> None:
        self._sites = sites
        self._told = [0] * len(sites)
        self._contents = cache(lambda folder: contents_of(Path(folder)))
        for number, site in enumerate(sites):
            site.ask_to_bring = partial(self._bring, to=number)

    def _bring(self, folder: str, *, to: int) -> calls.Bring | str | None:
        # those after it first, so that not all ask the same
        others = [*self._sites[to + 1 :], *self._sites[:to]]
        sources = [
            site.address
            for site in others
            if site.here is not None and not site.here.missing and folder not in site.here.lacks
        ]
        if sources:
            found = self._contents(folder)
            return calls.Bring(folder=folder, sources=tuple(sources), **found)
        if any(site.here is None for site in others):
            return None
        return (
            f"has no {folder}, and no other host's agent can give it (start one on the "
            "coordinator's host, or set SHOAL_CACHE to storage that all hosts share)"
        )

    def num_bytes(self) -> dict[str, int]:
        """What each host has read from others, by its name."""
        found = {site.name: sum(each.num_bytes for each in site.brought) for site in self._sites}
        return {name: count for name, count in found.items() if count}

    def events(self) -> list[Event]:
        """What was given since the last call."""
        found: list[Event] = []
        for number, site in enumerate(self._sites):
            for done in site.brought[self._told[number] :]:
                text = f"{site.name} was given {done.folder} ({format_bytes(done.num_bytes)})"
                if done.refused:
                    text += f", after {'; '.join(done.refused)}"
                fields = {"host": site.name, "folder": done.folder, "bytes": done.num_bytes}
                found.append(("fetched", {**fields, "refused": list(done.refused), "text": text}))
            self._told[number] = len(site.brought)
        return found
