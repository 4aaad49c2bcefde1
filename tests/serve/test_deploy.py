"""deploy/: what its files promise of each other and of `gblm serve`; the rules in promtool."""

from __future__ import annotations

import copy
import ipaddress
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql
import pytest
import yaml
from promql import ALERTS, DEPLOY, documents

from gblm.commands.serve import command

KUBERNETES = DEPLOY / "kubernetes"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
# Seconds that vLLM gets to end its processes once the requests are done.
MARGIN = 10
PROMTOOL = shutil.which("promtool")


def pods(path: Path) -> Iterator[dict[str, Any]]:
    for one in documents(path):
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield one["spec"]["template"]["spec"]


PODS = {path.stem: pod for path in KUBERNETES.glob("*.yaml") for pod in pods(path)}
every_pod = pytest.mark.parametrize("pod", PODS.values(), ids=PODS)


def server_of(pod: dict[str, Any]) -> dict[str, Any]:
    (server,) = pod["containers"]
    return server


def parsed(words: list[str]) -> dict[str, Any]:
    """What `gblm serve` understands; it refuses options that it does not have."""
    assert words[0] == "serve"
    return command.make_context("serve", words[1:]).params


def seconds(text: str) -> int:
    value, unit = re.fullmatch(r"(\d+)([sm])", text).groups()
    return int(value) * {"s": 1, "m": 60}[unit]


def window(probe: dict[str, Any]) -> int:
    """Seconds until a probe that fails from now on has its effect, at most."""
    return probe["failureThreshold"] * probe["periodSeconds"] + probe["timeoutSeconds"]


@every_pod
def test_grace_period_covers_the_hook_and_the_shutdown(pod: dict[str, Any]) -> None:
    server = server_of(pod)
    hook = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    timeout = parsed(server["args"])["shutdown_timeout"]
    assert hook > 0
    assert timeout > 0
    assert pod["terminationGracePeriodSeconds"] >= hook + timeout + MARGIN


def test_compose_waits_for_the_shutdown() -> None:
    server = COMPOSE["services"]["server"]
    timeout = parsed([re.sub(r"\$\{.*?\}", "x", word) for word in server["command"]])
    assert timeout["host"] == "0.0.0.0"
    assert seconds(server["stop_grace_period"]) >= timeout["shutdown_timeout"] + MARGIN


@every_pod
def test_probes(pod: dict[str, Any]) -> None:
    server = server_of(pod)
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    probes = [server[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    for probe in probes:
        assert probe["httpGet"]["path"] == "/health"
        assert ports[probe["httpGet"]["port"]] == parsed(server["args"])["port"]
    startup, readiness, liveness = map(window, probes)
    assert startup >= 15 * 60  # loading a large model
    assert readiness < liveness < startup
    # A server that is taken out of the balancing first has time to become well again.
    assert liveness >= 2 * readiness


@every_pod
def test_pods_have_no_rights(pod: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in (*pod["initContainers"], *pod["containers"]):
        user = container["securityContext"].get("runAsUser", pod["securityContext"]["runAsUser"])
        assert user > 0
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]


@every_pod
def test_the_key_comes_from_a_secret(pod: dict[str, Any]) -> None:
    server = server_of(pod)
    file = parsed(server["args"])["api_key_file"]
    (mount,) = (m for m in server["volumeMounts"] if Path(m["mountPath"]) == file.parent)
    (volume,) = (v for v in pod["volumes"] if v["name"] == mount["name"])
    assert volume["secret"]["secretName"]
    assert not any("KEY" in one["name"] for one in server.get("env", []))


def test_the_variants_differ_in_little() -> None:
    assert PODS.keys() == {"cpu", "gpu"}
    for pod in (cpu := copy.deepcopy(PODS["cpu"]), gpu := copy.deepcopy(PODS["gpu"])):
        server = server_of(pod)
        del server["resources"], server["image"]
        server.pop("env", None)
        pod.pop("tolerations", None)
    assert cpu == gpu


def test_nobody_but_prometheus_reaches_the_servers_port() -> None:
    found = {one["kind"]: one["spec"] for one in documents(KUBERNETES / "common.yaml")}
    assert [port["targetPort"] for port in found["Service"]["ports"]] == ["front"]
    for rule in found["NetworkPolicy"]["ingress"]:
        if "from" not in rule:
            assert [port["port"] for port in rule["ports"]] == ["front"]
    server = COMPOSE["services"]["server"]
    assert "ports" not in server
    assert [*server["networks"]] == ["back"]
    assert COMPOSE["networks"]["back"]["internal"] is True


def test_prometheus_may_scrape() -> None:
    """With the key in Compose, without it in Kubernetes, where it has none."""
    (job,) = yaml.safe_load(ALERTS.with_name("prometheus.yml").read_text())["scrape_configs"]
    secret = Path(job["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets")
    assert secret.name in COMPOSE["services"]["prometheus"]["secrets"]
    server = [re.sub(r"\$\{.*?\}", "x", w) for w in COMPOSE["services"]["server"]["command"]]
    assert parsed(server)["api_key_file"] == secret
    for pod in PODS.values():
        assert parsed(server_of(pod)["args"])["open_routes"] == ("metrics",)


def test_images_are_pinned() -> None:
    images = {service["image"] for service in COMPOSE["services"].values()}
    for pod in PODS.values():
        images |= {one["image"] for one in (*pod["initContainers"], *pod["containers"])}
    ours = {image for image in images if image.startswith(("gblm", "${GBLM_IMAGE:-gblm}"))}
    assert len(ours) == 3
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in images - ours)


def test_compose_locks_every_service_and_mounts_what_is_there() -> None:
    mounts = [v for one in COMPOSE["services"].values() for v in one.get("volumes", [])]
    paths = [mount.partition(":")[0] for mount in mounts if mount.startswith("./")]
    assert len(paths) == 4
    assert all((DEPLOY / path).exists() for path in paths)
    for service in COMPOSE["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_compose_gives_nginx_the_servers_address(tmp_path: Path) -> None:
    script = COMPOSE["services"]["front"]["command"][2].partition(" && ")[0]
    script = script.replace("/etc/gblm", str(DEPLOY)).replace("/etc/nginx/conf.d", str(tmp_path))
    subprocess.run(["sh", "-c", script], check=True)
    shipped, made = (
        path.read_text().splitlines() for path in (DEPLOY / "nginx.conf", tmp_path / "gblm.conf")
    )
    ((old, new),) = ((a, b) for a, b in zip(shipped, made, strict=True) if a != b)
    address = COMPOSE["services"]["server"]["networks"]["back"]["ipv4_address"]
    assert new == old.replace("127.0.0.1", address)
    (network,) = COMPOSE["networks"]["back"]["ipam"]["config"]
    assert ipaddress.ip_address(address) in ipaddress.ip_network(network["subnet"])


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    cases = yaml.safe_load(ALERTS.with_name("alerts_test.yml").read_text())["tests"]
    fires = {
        one["alertname"]
        for case in cases
        for one in case.get("alert_rule_test", [])
        if one["exp_alerts"]
    }
    assert fires == {rule["alert"] for rule in group["rules"]}


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: .ci/run installs it")
@pytest.mark.parametrize(
    "words",
    [["check", "config", "--syntax-only", "prometheus.yml"], ["check", "rules", "alerts.yml"],
     ["test", "rules", "alerts_test.yml"], ["check", "rules", "PANELS"]],
)  # fmt: skip
def test_rules_configuration_and_panels_in_promtool(words: list[str], tmp_path: Path) -> None:
    """Queries of the dashboard are checked as the rules that they could be."""
    queries = [*promql.of_panels(), *promql.of_variables()]
    rules = [{"record": f"panel:{number}", "expr": one} for number, one in enumerate(queries)]
    panels = tmp_path / "panels.yml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    words = [str(panels) if word == "PANELS" else word for word in words]
    done = subprocess.run(
        [str(PROMTOOL), *words], cwd=ALERTS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
