"""Kubernetes: an Indexed Job, a headless Service by which its pods find each other, a ConfigMap.

Nothing has to be installed in the cluster. The secret and the storage are the user's own objects.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from shoal.errors import UserError
from shoal.launch.clusters.start import Start

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?")
_HOSTS = "/shoal/hosts"


def manifests(start: Start, *, name: str, image: str, claim: str) -> str:
    """For kubectl apply. `claim`: a volume that all pods mount at the folder of --out, writable.

    Raises UserError for a name that Kubernetes does not take, and for a secret on that volume.
    """
    if start.keys.parent == start.out.parent:
        raise UserError(
            f"--keys: expected a folder of its own, for a Secret is mounted there; got {start.keys}"
        )
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name: expected small letters, digits and dashes, 42 at most, got {name!r}"
        )
    pods = [f"{name}-{number}.{name}:{start.port}" for number in range(start.num_hosts)]
    meta = {"name": name, "labels": {"app": name}}
    documents = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"job-name": name},
                "ports": [{"name": "agent", "port": start.port}],
            },
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": meta,
            "data": {"hosts": "\n".join(pods) + "\n"},
        },
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": _job(start, name)},
    ]
    pod: dict[str, Any] = documents[2]["spec"]["template"]["spec"]  # type: ignore[index]
    pod["containers"][0]["image"] = image
    pod["volumes"][2]["persistentVolumeClaim"]["claimName"] = claim
    return yaml.safe_dump_all(documents, sort_keys=False)


def _job(start: Start, name: str) -> dict[str, Any]:
    mistake = {"containerName": "worker", "operator": "In", "values": [2]}
    moved = [{"type": "DisruptionTarget", "status": "True"}]
    words = start.on_every_host('[ "$JOB_COMPLETION_INDEX" = 0 ]', hosts=_HOSTS)
    mounts = {"hosts": "/shoal", "keys": str(start.keys.parent), "runs": str(start.out.parent)}
    return {
        "completionMode": "Indexed",
        "completions": start.num_hosts,
        "parallelism": start.num_hosts,
        "backoffLimitPerIndex": 3,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": mistake},
                {"action": "Ignore", "onPodConditions": moved},
            ]
        },
        "template": {
            "metadata": {"labels": {"app": name}},
            "spec": {
                "subdomain": name,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 120,
                "containers": [
                    {
                        "name": "worker",
                        "image": "",
                        "command": ["/bin/bash", "-c", words],
                        "volumeMounts": [{"name": n, "mountPath": p} for n, p in mounts.items()],
                    }
                ],
                "volumes": [
                    {"name": "hosts", "configMap": {"name": name}},
                    {"name": "keys", "secret": {"secretName": f"{name}-keys", "defaultMode": 256}},
                    {"name": "runs", "persistentVolumeClaim": {"claimName": ""}},
                ],
            },
        },
    }
