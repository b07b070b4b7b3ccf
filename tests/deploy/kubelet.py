"""A container's process as the kubelet starts it: its manifest's arguments, environment and volumes, on paths of this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT, Resource, pod

Files = Mapping[str, str]


class Node:
    """One machine for the pods of some resources.

    Args:
        folder: volumes and logs; a claim is the same folder for every pod that names it.
        resources: where ConfigMaps are looked up.
        secrets: what nobody wrote into a manifest: name of the Secret -> its files.
    """

    def __init__(self, folder: Path, resources: list[Resource], secrets: Mapping[str, Files] | None = None) -> None:
        self._folder = folder
        self._maps: dict[str, Files] = {r["metadata"]["name"]: r["data"] for r in resources if r["kind"] == "ConfigMap"}
        self._secrets = dict(secrets or {})

    def claim(self, name: str) -> Path:
        """The folder behind a PersistentVolumeClaim."""
        folder = self._folder / "claims" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def container(self, workload: Resource, **overrides: str) -> Container:
        """The one container of a workload. `overrides` of its environment are for addresses and ports alone."""
        spec = pod(workload)
        assert spec is not None and len(spec["containers"]) == 1 and not spec.get("initContainers")
        (container,) = spec["containers"]
        home = self._folder / workload["metadata"]["name"]
        home.mkdir(parents=True, exist_ok=True)
        volumes = {volume["name"]: self._volume(home, volume) for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        found = re.compile(
            "|".join(rf"(?<![\w./-]){re.escape(path)}(?![\w.-])" for path in sorted(mounts, key=len, reverse=True))
        )

        def here(value: str) -> str:
            return found.sub(lambda match: str(mounts[match[0]]), value)

        given: dict[str, str] = {}
        for source in container.get("envFrom", []):
            given |= self._maps[source["configMapRef"]["name"]]
        given |= {entry["name"]: entry["value"] for entry in container.get("env", [])}
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("WORKER_")},
            **{name: here(value) for name, value in given.items()},
            "HOME": str(mounts["/tmp"]),
            "TMPDIR": str(mounts["/tmp"]),
            **overrides,
        }
        command = container.get("command", [sys.executable, "-m"])  # the images' ENTRYPOINT
        grace_s = spec.get("terminationGracePeriodSeconds", 30)
        return Container(home / "log", [*command, *map(here, container["args"])], environment, container, grace_s)

    def _volume(self, home: Path, volume: Resource) -> Path:
        if "persistentVolumeClaim" in volume:
            return self.claim(volume["persistentVolumeClaim"]["claimName"])
        folder = home / "volumes" / volume["name"]
        folder.mkdir(parents=True)
        sources = volume["projected"]["sources"] if "projected" in volume else [volume]
        for source in sources:
            if "configMap" in source:
                files = self._maps[source["configMap"]["name"]]
            elif "secret" in source:
                secret = source["secret"]
                files = self._secrets.get(secret.get("secretName") or secret["name"], {})
                assert files or secret.get("optional"), f"the kubelet would wait for the Secret {secret}"
                if "items" in secret:
                    files = {item["path"]: files[item["key"]] for item in secret["items"]}
            else:
                assert "emptyDir" in source, source
                files = {}
            for name, text in files.items():
                (folder / name).write_text(text)
        return folder


class Container:
    """What would run: `run` to its end, or `start` it and ask its pages."""

    def __init__(self, log: Path, command: list[str], environment: dict[str, str], manifest: Resource, grace_s: int) -> None:
        self.log = log
        self.command = command
        self.environment = environment
        self.manifest = manifest
        self.grace_s = grace_s
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Its command, or another one inside it (`kubectl exec`), to the end."""
        chosen = [sys.executable, "-m", *command] if command else self.command
        return subprocess.run(chosen, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def start(self, url: str) -> None:
        """Start it; its pages are at this address."""
        self.url = url
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)

    def page(self, path: str) -> tuple[int, str]:
        """Status and text, 0 where nothing answers yet; fails the test if it has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            pytest.fail(f"{self.command[2:]} ended with {self._process.returncode}: {self.tail()}")
        return get(self.url + path)

    def probe(self, name: str) -> int:
        """Status of `startupProbe`, `readinessProbe` or `livenessProbe`."""
        return self.page(self.manifest[name]["httpGet"]["path"])[0]

    def terminate(self) -> tuple[int, float]:
        """SIGTERM; exit code and seconds. After the grace period it is killed, as the kubelet does (-9)."""
        assert self._process is not None
        started = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            self.kill()
        return self._process.returncode, time.monotonic() - started

    def kill(self) -> None:
        """End it, if it is still there."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-2000:]


def get(url: str, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Status and text of a page; 0 and the reason where nothing answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)
