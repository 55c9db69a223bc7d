"""The registry in etcd (version 3, https://etcd.io): survives any minority of its servers.

Requests go to one server until it fails, then to the next; to that of this host first, if it has
one, so that who loses another host does not wait for its server too. Reads are linearizable, etcd's
default: a server that is cut off does not answer them. A change whose answer does not come is
`Unknown`.
"""

from __future__ import annotations

import base64
import importlib
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shoal.environment import address_towards
from shoal.errors import RunError
from shoal.launch.registry.store import Compare, Entry, Unknown, Unreachable

TIMEOUT_SECONDS = 3.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Etcd:
    """A `Store` of the keys below `prefix`."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        prefix: str,
        authority: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        insecure: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        """`endpoints`: http(s)://HOST:PORT of servers; no request is sent yet.

        `authority`, `certificate`, `key`: of TLS, files in PEM. `insecure`: also without it.
        Raises RunError for an endpoint that is no address, or that is neither loopback nor TLS,
        and where etcd3gw is missing.
        """
        self._prefix, self.endpoints = prefix, tuple(endpoints)
        try:
            theirs = importlib.import_module("etcd3gw")
        except ImportError:
            raise RunError(
                "etcd3gw is not installed, the client of etcd\n    pip install 'shoal[hosts]'"
            ) from None
        self._errors = importlib.import_module("etcd3gw.exceptions")
        addresses = [_address(each, insecure=insecure) for each in endpoints]
        self._clients = [
            theirs.Etcd3Client(
                host=host,
                port=port,
                protocol=scheme,
                ca_cert=str(authority) if authority else None,
                cert_cert=str(certificate) if certificate else None,
                cert_key=str(key) if key else None,
                timeout=timeout_seconds,
                api_path="/v3/",
            )
            for scheme, host, port in addresses
        ]
        self._next = next((n for n, (_, host, _) in enumerate(addresses) if _is_here(host)), 0)

    def read(self) -> dict[str, Entry]:
        body = {"key": _coded(self._prefix), "range_end": _coded(_after(self._prefix))}
        found = self._ask("kv/range", body).get("kvs", [])
        return {self._key(each): _entry(each) for each in found}

    def change(
        self,
        put: Mapping[str, bytes],
        *,
        when: Sequence[Compare] = (),
        delete: Sequence[str] = (),
        lease: int | None = None,
    ) -> int | None:
        held = {} if lease is None else {"lease": lease}
        done = [{"request_delete_range": {"key": _coded(self._prefix + key)}} for key in delete] + [
            {"request_put": {"key": _coded(self._prefix + key), "value": _b64(value), **held}}
            for key, value in put.items()
        ]
        body = {"compare": [self._condition(each) for each in when], "success": done}
        try:
            said = self._post("kv/txn", body)
        except self._errors.Etcd3Exception as error:
            if "lease not found" in f"{error} {getattr(error, 'detail_text', '')}":
                raise LookupError(f"lease {lease} has ended") from None
            raise Unknown(f"{self._asked()}: no answer to a change ({error})") from None
        return int(said["header"]["revision"]) if said.get("succeeded", False) else None

    def grant(self, seconds: int) -> int:
        return int(self._ask("lease/grant", {"TTL": seconds, "ID": 0})["ID"])

    def keep(self, lease: int) -> bool:
        said = self._ask("lease/keepalive", {"ID": lease}).get("result", {})
        return int(said.get("TTL", 0)) > 0

    def revoke(self, lease: int) -> None:
        try:
            self._ask("lease/revoke", {"ID": lease})
        except LookupError:
            pass  # it has ended by itself

    def _ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """A request that may be made twice, of any server. Raises Unreachable, LookupError."""
        said: Exception | None = None
        for _ in self._clients:
            try:
                return self._post(path, body)
            except self._errors.Etcd3Exception as error:
                if "not found" in f"{error} {getattr(error, 'detail_text', '')}":
                    raise LookupError(str(error)) from None
                said = error
        raise Unreachable(f"{self._asked()}: none answers ({said})") from None

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """One request to one server; the next request goes to another where it fails."""
        client = self._clients[self._next]
        try:
            return client.post(client.get_url(path), json=body)
        except self._errors.Etcd3Exception:
            self._next = (self._next + 1) % len(self._clients)
            raise

    def _condition(self, each: Compare) -> dict[str, Any]:
        target, name = {
            "created": ("CREATE", "create_revision"),
            "changed": ("MOD", "mod_revision"),
        }[each.what]
        key = _coded(self._prefix + each.key)
        return {"key": key, "target": target, "result": "EQUAL", name: each.revision}

    def _key(self, found: Mapping[str, Any]) -> str:
        return base64.b64decode(found["key"]).decode().removeprefix(self._prefix)

    def _asked(self) -> str:
        return f"etcd at {', '.join(self.endpoints)}"


def _address(endpoint: str, *, insecure: bool) -> tuple[str, str, int]:
    """Scheme, host and port."""
    parts = urlsplit(endpoint)
    try:
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port
    except ValueError:
        known = False
    if not known:
        raise RunError(f"etcd: expected http://HOST:PORT or https://HOST:PORT, got {endpoint!r}")
    assert parts.hostname is not None and parts.port is not None, "checked above"
    if parts.scheme == "http" and not insecure and parts.hostname not in _LOOPBACK:
        raise RunError(
            f"etcd at {endpoint}: whoever can reach it could steer the run\n"
            "    use https with certificates, or a server on loopback"
        )
    return parts.scheme, parts.hostname, parts.port


def _is_here(host: str) -> bool:
    """Whether that is this host, as far as it can be told without asking a name server."""
    try:
        return bool(ipaddress.IPv4Address(host)) and address_towards(host) == host
    except OSError:
        return False
    except ValueError:
        return host in ("localhost", socket.gethostname())


def _entry(found: Mapping[str, Any]) -> Entry:
    return Entry(
        base64.b64decode(found.get("value", "")),
        int(found["create_revision"]),
        int(found["mod_revision"]),
    )


def _after(prefix: str) -> str:
    """The first key that does not begin with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _coded(key: str) -> str:
    return _b64(key.encode())


def _b64(value: bytes) -> str:
    return base64.b64encode(value).decode()
