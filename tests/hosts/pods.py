"""Plays the manifests of an Indexed Job on hosts of a lab: a kubelet of a hundred lines.

It does what the printed text says, and refuses what it does not know: names of pods by the headless
Service, volumes at their paths, the completion index, a pod that fails begun anew under its index
up to its limit, exit codes that fail the Job, SIGTERM and a grace period at the end.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hosts.lab import Host, Lab


class Job:
    """One Job on the lab's hosts, a pod on each. `env`: what stands for the image's own.

    `secrets`, `claims`: the folders that stand for the user's own objects, by their names.
    """

    def __init__(
        self,
        text: str,
        lab: Lab,
        *,
        folder: Path,
        env: Mapping[str, str],
        secrets: Mapping[str, Path],
        claims: Mapping[str, Path],
    ) -> None:
        service, self.config, job = yaml.safe_load_all(text)
        assert (service["kind"], self.config["kind"], job["kind"]) == (
            "Service",
            "ConfigMap",
            "Job",
        )
        assert service["spec"]["clusterIP"] == "None"
        self.name, self.spec = job["metadata"]["name"], job["spec"]
        assert self.spec["completionMode"] == "Indexed"
        assert service["spec"]["selector"] == {"job-name": self.name}
        self.pod = self.spec["template"]["spec"]
        assert self.pod["restartPolicy"] == "Never"
        assert self.pod["subdomain"] == service["metadata"]["name"]
        self.lab, self.folder, self.env = lab, folder, env
        self.objects = {"secret": secrets, "persistentVolumeClaim": claims}
        self.failures = [0] * self.spec["completions"]
        self.status: list[int | None] = [None] * self.spec["completions"]
        self.failed, self._made = False, list[Path]()
        self._resolve()
        self.pods = [self._start(number) for number in range(self.spec["completions"])]

    def _resolve(self) -> None:
        """Every pod knows the others' names, ready or not."""
        names = [f"{self.name}-{n}.{self.pod['subdomain']}" for n in range(len(self.status))]
        known = "".join(f"{h.address} {name}\n" for h, name in zip(self.lab.hosts, names))
        for host in self.lab.hosts:
            host.run("bash", "-c", f"cat >> /etc/hosts <<'END'\n{known}END")

    def _folder_of(self, volume: Mapping[str, Any]) -> Path:
        if "configMap" in volume:
            folder = self.folder / "config"
            folder.mkdir(exist_ok=True)
            for name, text in self.config["data"].items():
                (folder / name).write_text(text)
            return folder
        if "secret" in volume:
            return self.objects["secret"][volume["secret"]["secretName"]]
        return self.objects["persistentVolumeClaim"][volume["persistentVolumeClaim"]["claimName"]]

    def _start(self, number: int) -> subprocess.Popen[str]:
        host: Host = self.lab.hosts[number]
        (container,) = self.pod["containers"]
        folders = {each["name"]: self._folder_of(each) for each in self.pod["volumes"]}
        for mount in container["volumeMounts"]:
            where, path = folders[mount["name"]], Path(mount["mountPath"])
            if not path.exists():
                path.mkdir(parents=True)
                self._made.append(path)
            host.run("bash", "-c", f"mountpoint -q {path} || mount -B {where} {path}")
        log = (self.folder / f"pod-{number}.log").open("a")
        env = {**self.env, "JOB_COMPLETION_INDEX": str(number)}
        with log:
            return host.start(*container["command"], env=env, stdout=log, stderr=subprocess.STDOUT)

    def turn(self) -> None:
        """Look at every pod; begin anew what failed."""
        rules = self.spec["podFailurePolicy"]["rules"]
        for number, pod in enumerate(self.pods):
            status = pod.poll()
            if status is None or self.status[number] is not None:
                continue
            if status == 0:
                self.status[number] = 0
                continue
            codes = [r["onExitCodes"]["values"] for r in rules if r["action"] == "FailJob"]
            self.failures[number] += 1
            if any(status in each for each in codes):
                self.failed = True
            elif self.failures[number] <= self.spec["backoffLimitPerIndex"]:
                self.pods[number] = self._start(number)
                continue
            self.status[number] = status

    def wait(self, *, seconds: float) -> list[int | None]:
        """Exit status of each index, once all have ended or the Job has failed."""
        deadline = time.monotonic() + seconds
        while None in self.status and not self.failed:
            assert time.monotonic() < deadline, self.said()
            self.turn()
            time.sleep(0.1)
        self.delete()
        return self.status

    def delete(self) -> None:
        """As `kubectl delete job`: SIGTERM, the grace period, SIGKILL."""
        for pod in self.pods:
            if pod.poll() is None:
                pod.send_signal(signal.SIGTERM)
        for pod in self.pods:
            pod.wait(timeout=self.pod["terminationGracePeriodSeconds"])
        for path in self._made:
            path.rmdir()  # what was mounted there is the hosts' alone

    def said(self) -> str:
        return "\n".join(each.read_text()[-1500:] for each in self.folder.glob("pod-*.log"))
