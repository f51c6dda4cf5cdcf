"""Every pod of every scenario keeps to Pod Security's level "restricted", and to what the project asks on top.

The rules are written down here from Kubernetes' page on Pod Security Standards; they know nothing of the chart.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helm.chart import SCENARIOS, Object, Pod, pod, pods, render

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
}
SELINUX = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SECCOMP = {"RuntimeDefault", "Localhost"}


def violations(spec: Object) -> Iterator[str]:
    """What of a pod's specification the level "restricted" forbids."""
    context = spec.get("securityContext") or {}
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))
    if spec.get("hostUsers"):
        yield "hostUsers"
    yield from (f"volume {each['name']}" for each in spec.get("volumes") or [] if not VOLUMES & each.keys())
    yield from (f"sysctl {each['name']}" for each in context.get("sysctls") or [] if each["name"] not in SYSCTLS)
    if context.get("runAsUser") == 0:
        yield "runAsUser"
    yield from _of_any(context)
    for container in _containers(spec):
        for violation in _of_container(container, context):
            yield f"{container['name']}: {violation}"


def _containers(spec: Object) -> list[Object]:
    kinds = ("initContainers", "containers", "ephemeralContainers")
    return [each for kind in kinds for each in spec.get(kind) or []]


def _of_container(container: Object, pod_context: Object) -> Iterator[str]:
    context = container.get("securityContext") or {}
    capabilities = context.get("capabilities") or {}
    if context.get("privileged"):
        yield "privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if not context.get("runAsNonRoot", pod_context.get("runAsNonRoot")):
        yield "runAsNonRoot"
    if context.get("runAsUser") == 0:
        yield "runAsUser"
    if (context.get("seccompProfile") or pod_context.get("seccompProfile") or {}).get("type") not in SECCOMP:
        yield "seccompProfile"
    if "ALL" not in (capabilities.get("drop") or []):
        yield "capabilities.drop"
    if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield "capabilities.add"
    if context.get("procMount", "Default") != "Default":
        yield "procMount"
    yield from (f"hostPort {port['hostPort']}" for port in container.get("ports") or [] if port.get("hostPort"))
    yield from (f"host of {name}" for name in _hosts(container))
    yield from _of_any(context)


def _of_any(context: Object) -> Iterator[str]:
    """What neither a pod's context nor a container's may say."""
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("type") not in SELINUX or selinux.get("user") or selinux.get("role"):
        yield "seLinuxOptions"
    if (context.get("seccompProfile") or {"type": "RuntimeDefault"}).get("type") not in SECCOMP:
        yield "seccompProfile"
    if (context.get("appArmorProfile") or {"type": "RuntimeDefault"}).get("type") not in SECCOMP:
        yield "appArmorProfile"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield "hostProcess"


def _hosts(container: Object) -> Iterator[str]:
    """Probes and hooks that name a host, which lets a kubelet ask others."""
    actions = {name: container.get(name) or {} for name in ("livenessProbe", "readinessProbe", "startupProbe")}
    actions |= container.get("lifecycle") or {}
    for name, action in actions.items():
        if any((action.get(kind) or {}).get("host") for kind in ("httpGet", "tcpSocket")):
            yield name


def _see(each: Pod, check: Callable[[Pod], Any]) -> None:
    found = check(each)
    assert not found, f"{each}: {found}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pods_are_restricted(scenario: str) -> None:
    found = pods(render(scenario=scenario))
    assert len(found) >= 4
    for each in found:
        _see(each, lambda pod: list(violations(pod.spec)))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_containers_cannot_write_to_their_image(scenario: str) -> None:
    for each in pods(render(scenario=scenario)):
        writable = [
            container["name"]
            for container in each.containers()
            if not container["securityContext"].get("readOnlyRootFilesystem")
        ]
        assert not writable, f"{each}: {writable}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_containers_state_what_they_need(scenario: str) -> None:
    for each in pods(render(scenario=scenario)):
        for container in each.containers():
            resources = container["resources"]
            assert resources["requests"].keys() >= {"cpu", "memory"}, f"{each}: {container['name']}"
            assert "memory" in resources["limits"], f"{each}: {container['name']}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pods_get_no_token_and_no_variables_of_services(scenario: str) -> None:
    """Services named merger-... would otherwise give pods variables MERGER_..., which are read as settings."""
    for each in pods(render(scenario=scenario)):
        assert each.spec["enableServiceLinks"] is False, each
        if each.owner["kind"] != "RayCluster":  # the head's autoscaler asks the API server for nodes
            assert each.spec["automountServiceAccountToken"] is False, each


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_writable_folders_of_pods_are_bounded(scenario: str) -> None:
    """A folder without a bound fills the node's disk, and then every pod of the node goes."""
    for each in pods(render(scenario=scenario)):
        for volume in each.spec.get("volumes") or []:
            if "emptyDir" in volume:
                assert (volume["emptyDir"] or {}).get("sizeLimit"), f"{each}: {volume['name']}"


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the node's network": ({"hostNetwork": True}, {}, "hostNetwork"),
    "the node's processes": ({"hostPID": True}, {}, "hostPID"),
    "the node's memory": ({"hostIPC": True}, {}, "hostIPC"),
    "the node's files": ({"volumes": [{"name": "etc", "hostPath": {"path": "/etc"}}]}, {}, "volume etc"),
    "a network's files": ({"volumes": [{"name": "far", "nfs": {"server": "a", "path": "/"}}]}, {}, "volume far"),
    "a pod of root's": ({"securityContext": {"runAsNonRoot": True, "runAsUser": 0}}, {}, "runAsUser"),
    "any user": ({"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}, {}, "api: runAsNonRoot"),
    "every call": ({"securityContext": {"runAsNonRoot": True}}, {}, "api: seccompProfile"),
    "a kernel's setting": (
        {"securityContext": {"runAsNonRoot": True, "sysctls": [{"name": "kernel.msgmax", "value": "1"}]}},
        {},
        "sysctl kernel.msgmax",
    ),
    "privileged": ({}, {"privileged": True}, "api: privileged"),
    "escalation": ({}, {"allowPrivilegeEscalation": None}, "api: allowPrivilegeEscalation"),
    "a container of root's": ({}, {"runAsUser": 0}, "api: runAsUser"),
    "a container of anybody's": ({}, {"runAsNonRoot": False}, "api: runAsNonRoot"),
    "calls of one container": ({}, {"seccompProfile": {"type": "Unconfined"}}, "api: seccompProfile"),
    "capabilities kept": ({}, {"capabilities": {"drop": ["NET_RAW"]}}, "api: capabilities.drop"),
    "capabilities added": ({}, {"capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE"]}}, "api: capabilities.add"),
    "another /proc": ({}, {"procMount": "Unmasked"}, "api: procMount"),
    "SELinux": ({}, {"seLinuxOptions": {"type": "spc_t"}}, "api: seLinuxOptions"),
    "AppArmor": ({}, {"appArmorProfile": {"type": "Unconfined"}}, "api: appArmorProfile"),
    "Windows": ({}, {"windowsOptions": {"hostProcess": True}}, "api: hostProcess"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_forbidden_is_seen(name: str) -> None:
    of_pod, of_container, expected = BAD[name]
    spec = copy.deepcopy(pod(render(scenario="minimal"), "-api").spec)
    assert not list(violations(spec))
    spec |= of_pod
    spec["containers"][0]["securityContext"] |= of_container
    assert expected in list(violations(spec))


def test_ports_and_probes_of_others_are_seen() -> None:
    spec = copy.deepcopy(pod(render(scenario="minimal"), "-api").spec)
    spec["containers"][0]["ports"][0]["hostPort"] = 80
    spec["containers"][0]["livenessProbe"]["httpGet"]["host"] = "10.0.0.1"
    assert {*violations(spec)} == {"api: hostPort 80", "api: host of livenessProbe"}
