"""The examples in deploy/ fit their formats, each other, and what Polder does."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from polder.engines.vllm.compat import TESTED
from polder.serve import process, run
from polder.serve.keys import OPEN, VARIABLE
from polder.serve.schema import read_tables, read_toml

DEPLOY = Path(__file__).parents[2] / "deploy"
STOP_S = run.DRAIN_S + 15 + 2 * process.SWEEP_S + 5 + 2 * process.SWEEP_S
"""The longest that a fleet takes to end: requests, engines, their trees, the broker and its tree (run.py, process.py)."""


def documents(name: str) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all((DEPLOY / name).read_text()) if found]


def dockerfile(instruction: str) -> list[str]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{instruction} ")]


def compose() -> dict[str, Any]:
    (found,) = documents("compose.yaml")
    return found


def pod() -> dict[str, Any]:
    (deployment,) = (found for found in documents("kubernetes.yaml") if found["kind"] == "Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def unit() -> dict[str, str]:
    lines = (line.partition("=") for line in (DEPLOY / "polder.service").read_text().splitlines() if line[:1] != "#")
    return {key: value for key, separator, value in lines if separator}


# ---------------------------------------------------------------- formats


def test_compose_fits_its_schema() -> None:
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for config in compose()["configs"].values():
        assert yaml.safe_load(config["content"])


def test_manifests_fit_the_schemas_of_kubernetes() -> None:
    """Not in CI: the package has 17,000 files, a schema for each release."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for found in documents("kubernetes.yaml"):
        validate.validate(found, validate.latest_version(), strict=True)


def test_the_unit_is_one_that_systemd_accepts(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    copy = tmp_path / "polder.service"
    copy.write_text((DEPLOY / "polder.service").read_text().replace("/opt/polder/bin/polder", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "polder.service" in line]) == (0, [])


# ---------------------------------------------------------------- what they say


def fleet_files() -> dict[str, dict[str, Any]]:
    (mapped,) = (found for found in documents("kubernetes.yaml") if found["kind"] == "ConfigMap")
    return {"fleet.toml": read_toml(DEPLOY / "fleet.toml"), "kubernetes": tomllib.loads(mapped["data"]["fleet.toml"])}


@pytest.mark.parametrize("place", ["fleet.toml", "kubernetes"])
def test_the_fleet_files_are_complete_and_can_be_reached_from_outside(place: str) -> None:
    fleet = read_tables(fleet_files()[place])
    assert (fleet.server.host, fleet.server.port) == ("0.0.0.0", 8000)


def test_each_waits_as_long_as_a_fleet_may_take_to_end() -> None:
    seconds = (
        compose()["services"]["polder"]["stop_grace_period"].removesuffix("s"),
        pod()["terminationGracePeriodSeconds"],
        unit()["TimeoutStopSec"],
    )
    assert min(map(int, seconds)) > STOP_S


def test_the_image_is_a_vllm_that_polder_works_with_and_runs_as_nobodys_root() -> None:
    image, version = dockerfile("FROM")[0].split(":v")
    assert image == "vllm/vllm-openai"
    assert version in TESTED
    (user,) = dockerfile("USER")
    (made,) = (line for line in dockerfile("RUN") if "useradd" in line)
    assert f"--uid {user} " in made
    context = pod()["securityContext"]
    assert (context["runAsNonRoot"], str(context["runAsUser"]), str(context["fsGroup"])) == (True, user, user)
    copied = [name for line in dockerfile("COPY") for name in line.split()[:-1]]
    assert all((DEPLOY.parent / name).exists() for name in copied)


def test_what_is_asked_by_probes_needs_no_key() -> None:
    (container,) = pod()["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths["startup"] == "/health"
    assert set(paths.values()) <= set(OPEN)
    assert container["env"][0]["name"] == VARIABLE
    assert VARIABLE in compose()["services"]["polder"]["environment"]


def test_shared_memory_is_larger_than_a_containers_default() -> None:
    (container,) = pod()["containers"]
    (mount,) = (mount for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    (volume,) = (volume for volume in pod()["volumes"] if volume["name"] == mount["name"])
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert compose()["services"]["polder"]["shm_size"] == "4gb"


def test_each_file_that_compose_mounts_is_here() -> None:
    mounts = [mount for service in compose()["services"].values() for mount in service["volumes"]]
    here = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    assert here
    assert all((DEPLOY / name).is_file() for name in here)
    assert (DEPLOY / compose()["services"]["polder"]["build"]["context"] / "deploy" / "Dockerfile").exists()


def test_the_unit_serves_the_fleet_and_lets_polder_end_it() -> None:
    assert shlex.split(unit()["ExecStart"])[1:3] == ["serve", "/etc/polder/fleet.toml"]
    assert unit()["KillMode"] == "mixed"  # SIGTERM to Polder alone, which ends its children
