"""The files in tpu/ that no program of ours reads: linted, parsed, and their options held against the command line."""

from __future__ import annotations

import argparse
import configparser
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxserve.cli import ENGINE_OPTIONS, SERVER_OPTIONS, make_parser
from jaxserve.cli_flags import read_options

TPU = Path(__file__).parent.parent.parent / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))
MANIFESTS = sorted((TPU / "gke").glob("*.yaml"))
TEXTS = [TPU / "README.md", TPU / "jaxserve.service", *TPU.glob("Dockerfile*"), *SCRIPTS]

YAML_RULES = {
    "extends": "default",
    "rules": {
        "document-start": "disable",
        "line-length": {"max": 130},
        "comments": {"min-spaces-from-content": 1},
    },
}
_TPU = "google.com/tpu"
_TOPOLOGY = "cloud.google.com/gke-tpu-topology"


def tool(name: str, *arguments: str | Path) -> None:
    """Runs a linter of the environment that runs the tests."""
    done = subprocess.run([Path(sys.executable).parent / name, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def documents(manifest: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(manifest.read_text()) if document is not None]


def pod_templates(document: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """(hosts that share a slice, pod template) of whatever makes pods."""
    spec = document["spec"]
    if document["kind"] == "Deployment":
        return [(1, spec["template"])]
    if document["kind"] == "LeaderWorkerSet":
        group = spec["leaderWorkerTemplate"]
        return [(group["size"], group[name]) for name in ("leaderTemplate", "workerTemplate") if name in group]
    return []


def templates() -> list[Any]:
    found = [
        (manifest.name, number, hosts, template)
        for manifest in MANIFESTS
        for document in documents(manifest)
        for number, (hosts, template) in enumerate(pod_templates(document))
    ]
    return [pytest.param(hosts, template, id=f"{name}-{number}") for name, number, hosts, template in found]


def served(container: dict[str, Any]) -> argparse.Namespace:
    """The container's command line as jaxserve reads it; what Kubernetes fills in is a number here."""
    return make_parser().parse_args([re.sub(r"\$\(\w+\)", "1", word) for word in container["args"]])


def command_lines(text: str) -> list[list[str]]:
    """The words of every `jaxserve COMMAND ...` in a script or page, up to the end of the command."""
    joined = re.sub(r"\\\n\s*", " ", text)
    commands = re.findall(
        r"(?:^|[ `/])jaxserve(?:-gpu|-tpu)?((?: (?:serve|compile|new-key))(?:[^|&;#`\n>]*))", joined, re.MULTILINE
    )
    return [shlex.split(command) for command in commands]


def test_scripts_pass_shellcheck() -> None:
    tool("shellcheck", *SCRIPTS)


def test_yaml_passes_yamllint() -> None:
    tool("yamllint", "--strict", "--config-data", json.dumps(YAML_RULES), TPU)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_command_lines_are_understood(path: Path) -> None:
    for words in command_lines(path.read_text()):
        parser = make_parser()
        try:
            parser.parse_args(words)
        except SystemExit as end:
            assert end.code == 0, f"{path.name}: jaxserve {' '.join(words)}"


def test_command_lines_are_found() -> None:
    """Of the test above, which would else pass on nothing."""
    found = {(path.name, words[0]) for path in TEXTS for words in command_lines(path.read_text())}
    wanted = {("README.md", "new-key"), ("jaxserve.service", "serve"), ("Dockerfile.gpu", "serve"), ("setup.sh", "new-key")}
    assert wanted <= found


def test_options_of_the_unit() -> None:
    known = {**ENGINE_OPTIONS, **SERVER_OPTIONS}
    options = read_options(argparse.Namespace(config=str(TPU / "serve.yaml")), known)
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(TPU / "jaxserve.service")
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    service = unit["Service"]
    assert service["ExecStart"].split()[-2:] == ["/etc/jaxserve/serve.yaml", "$JAXSERVE_GROUP"]
    assert int(service["TimeoutStopSec"]) > options["shutdown_timeout"] + 10
    assert Path(options["model"]).is_relative_to(f"/var/lib/{service['StateDirectory']}")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests_hang_together(manifest: Path) -> None:
    """Each object has what every object needs, and each service finds pods."""
    objects = documents(manifest)
    assert all(o["apiVersion"] and o["kind"] and o["metadata"]["name"] for o in objects)
    labels = [template["metadata"]["labels"] for o in objects for _, template in pod_templates(o)]
    assert labels
    for service in (o for o in objects if o["kind"] == "Service"):
        assert any(service["spec"]["selector"].items() <= found.items() for found in labels)
    for deployment in (o for o in objects if o["kind"] == "Deployment"):
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels[0].items()


@pytest.mark.parametrize(("hosts", "template"), templates())
def test_pods(hosts: int, template: dict[str, Any]) -> None:
    """The command is one, chips add up to the slice, every mount has its volume, and draining has the time it needs."""
    spec = template["spec"]
    [container] = spec["containers"]
    options = vars(served(container))
    chips = math.prod(map(int, spec["nodeSelector"][_TOPOLOGY].split("x")))
    assert container["resources"]["limits"] == container["resources"]["requests"] == {_TPU: chips // hosts}
    assert options["tensor_parallel_size"] == chips
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    assert any(options["model"].startswith(mount["mountPath"]) for mount in container["volumeMounts"])
    wait_s = int(container["lifecycle"]["preStop"]["exec"]["command"][-1]) if "lifecycle" in container else 0
    assert spec["terminationGracePeriodSeconds"] > wait_s + options["shutdown_timeout"]
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
    assert not ports or ports == {"http": options.get("port", SERVER_OPTIONS["port"].default)}
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container]
    assert all(probe == {"path": "/health", "port": "http"} for probe in probes)


def test_a_group_has_one_command() -> None:
    """Every host runs the same, but for which process it is; and all of it comes from LeaderWorkerSet."""
    [group] = [o for o in documents(TPU / "gke" / "multi-host.yaml") if o["kind"] == "LeaderWorkerSet"]
    (hosts, leader), (_, worker) = pod_templates(group)
    [of_leader], [of_worker] = leader["spec"]["containers"], worker["spec"]["containers"]
    assert of_leader["args"] == of_worker["args"] and "readinessProbe" in of_leader and "ports" not in of_worker
    assert served(of_leader).tensor_parallel_size % hosts == 0
    filled_in = {
        "--num-processes=$(LWS_GROUP_SIZE)",
        "--process-id=$(LWS_WORKER_INDEX)",
        "--coordinator=$(LWS_LEADER_ADDRESS):8476",
    }
    assert filled_in <= set(of_leader["args"])


def test_group_tells_each_vm_its_part(tmp_path: Path) -> None:
    """With a gcloud that knows two VMs and writes down what would be run on them."""
    fake = tmp_path / "gcloud"
    fake.write_text(
        f"""#!/bin/sh
        case "$4" in
            describe) printf '10.0.0.5\\n10.0.0.6\\n' ;;
            ssh) printf '%s\\n' "$*" >>{tmp_path}/ssh; cat >>{tmp_path}/keys ;;
        esac"""
    )
    fake.chmod(0o755)
    subprocess.run([TPU / "group.sh", "big", "zone"], check=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    written = re.findall("echo 'JAXSERVE_GROUP=(.*)'", (tmp_path / "ssh").read_text())
    groups = [make_parser().parse_args(["serve", "model", *line.split()]) for line in written]
    assert [(g.num_processes, g.process_id, g.coordinator) for g in groups] == [(2, 0, "10.0.0.5:8476"), (2, 1, "10.0.0.5:8476")]
    first, second = (tmp_path / "keys").read_text().split()
    assert first == second and len(first) == 64 and first not in (tmp_path / "ssh").read_text()


@pytest.mark.parametrize(("dockerfile", "extra"), [("Dockerfile", "tpu"), ("Dockerfile.gpu", "$CUDA")])
def test_images_install_what_there_is(dockerfile: str, extra: str) -> None:
    text = (TPU / dockerfile).read_text()
    copied = [source for source in re.findall(r"^COPY (\S+) ", text, re.MULTILINE) if source != "."]
    kept = {line[1:] for line in (TPU.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied and set(copied) <= kept
    assert all((TPU.parent / name).exists() for name in kept)
    assert f"/tmp/jaxserve[{extra}]" in text


def test_create_prints_what_it_would_run() -> None:
    printed = subprocess.run(
        [TPU / "create.sh", "--spot", "--print", "big", "some-zone", "v6e-8", "--network", "lan"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
    ).stdout.splitlines()
    words = [shlex.split(line) for line in printed]
    assert words[0][:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    wanted = "--node-id big --zone some-zone --accelerator-type v6e-8 --runtime-version v2-alpha-tpuv6e --spot --network lan"
    assert words[0][5:] == ["big", *shlex.split(wanted)]
    assert [line[:5] for line in words[2:]] == [["gcloud", "compute", "tpus", "tpu-vm", verb] for verb in ("scp", "ssh")]


@pytest.mark.parametrize("arguments", [[], ["--fast", "a", "b", "v6e-8"], ["a", "b", "v99-8"]])
def test_create_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    done = subprocess.run([TPU / "create.sh", *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr
