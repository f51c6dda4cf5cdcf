"""Who may talk to whom: the network policies of the chart, as a cluster that enforces them would decide.

The rules by which a connection is judged are Kubernetes' own: a pod that some policy takes may only do what one of them
allows, and a connection needs both ends to agree.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.helm.chart import Object, Pod, every, find, pod, render, selects

NAMESPACE = "models"
HUB, METADATA, PRIVATE = "18.164.174.23", "169.254.169.254", "10.20.0.7"
STRANGER: dict[str, str] = {"app": "stranger"}

End = str | tuple[str, Mapping[str, str]]  # an address of the outside, or a namespace and a pod's labels


def allowed(objects: Sequence[Object], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection comes about."""
    return _agrees(objects, "Egress", source, target, port, protocol) and _agrees(
        objects, "Ingress", target, source, port, protocol
    )


def _agrees(objects: Sequence[Object], way: str, own: End, other: End, port: int, protocol: str) -> bool:
    """Whether the policies of one end let it talk to the other."""
    if isinstance(own, str) or own[0] != NAMESPACE:
        return True  # not ours
    policies = [
        each["spec"]
        for each in every(objects, "NetworkPolicy")
        if way in each["spec"]["policyTypes"] and selects(each["spec"]["podSelector"], own[1])
    ]
    rules = [rule for spec in policies for rule in spec.get(way.lower()) or []]
    peers = "to" if way == "Egress" else "from"
    return not policies or any(
        _has_port(rule, port, protocol) and (peers not in rule or any(_is(peer, other) for peer in rule[peers]))
        for rule in rules
    )


def _has_port(rule: Mapping[str, Any], port: int, protocol: str) -> bool:
    return "ports" not in rule or any(
        each.get("port") == port and each.get("protocol", "TCP") == protocol for each in rule["ports"]
    )


def _is(peer: Mapping[str, Any], end: End) -> bool:
    if isinstance(end, str):
        block, address = peer.get("ipBlock"), ipaddress.ip_address(end)
        if not block or address not in ipaddress.ip_network(block["cidr"]):
            return False
        return not any(address in ipaddress.ip_network(each) for each in block.get("except") or [])
    namespace, labels = end
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" not in peer:
        return namespace == NAMESPACE and selects(peer["podSelector"], labels)
    return selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}) and selects(
        peer.get("podSelector") or {}, labels
    )


def _end(each: Pod) -> End:
    return NAMESPACE, each.labels


def _ends(objects: Sequence[Object]) -> dict[str, End]:
    names = ("api", "dispatcher", "smoke")
    ends = {name: _end(pod(objects, f"-{name}")) for name in names}
    labels = pod(objects, "-api").labels
    ends["migrations"] = (NAMESPACE, {**labels, "app.kubernetes.io/component": "migrations"})
    ends["postgresql"] = (NAMESPACE, {**labels, "app.kubernetes.io/component": "postgresql"})
    ends["runner"] = (NAMESPACE, {**labels, "app.kubernetes.io/component": "ray", "ray.io/node-type": "worker"})
    return ends


CASES = [
    # whose, to whom, port, with which values, and whether
    ("api", PRIVATE, 5432, {}, True),
    ("dispatcher", PRIVATE, 5432, {}, True),
    ("migrations", PRIVATE, 5432, {}, True),
    ("smoke", PRIVATE, 5432, {}, False),
    ("api", PRIVATE, 6432, {}, False),
    ("api", PRIVATE, 6432, {"databasePort": 6432}, True),
    ("api", PRIVATE, 5432, {"databaseTo": [{"ipBlock": {"cidr": "10.30.0.0/16"}}]}, False),
    ("api", "10.30.0.7", 5432, {"databaseTo": [{"ipBlock": {"cidr": "10.30.0.0/16"}}]}, True),
    ("api", HUB, 443, {}, True),
    ("api", "2600:9000::1", 443, {}, True),
    ("api", HUB, 80, {}, False),
    ("api", METADATA, 443, {}, False),
    ("api", PRIVATE, 443, {}, False),
    ("api", "fd00::1", 443, {}, False),
    ("api", PRIVATE, 443, {"httpsExcept": []}, True),
    ("api", "fd00::1", 443, {"httpsExcept6": []}, True),
    ("dispatcher", HUB, 443, {}, False),
    ("migrations", HUB, 443, {}, False),
    ("smoke", HUB, 443, {}, False),
    ("smoke", "api", 8080, {}, True),
    ("dispatcher", "api", 8081, {}, False),
    ("api", ("minio", STRANGER), 9000, {}, False),
    ("api", ("minio", STRANGER), 9000, {"extraEgress": [{"ports": [{"port": 9000}]}]}, True),
    ((NAMESPACE, STRANGER), "api", 8080, {}, False),
    ((NAMESPACE, STRANGER), "api", 8080, {"ingressFrom": [{"podSelector": {}}]}, True),
    (("ingress", STRANGER), "api", 8080, {}, False),
    (("ingress", STRANGER), "api", 8080, {"ingressNamespaces": ["ingress"]}, True),
    (("ingress", STRANGER), "dispatcher", 8081, {"ingressNamespaces": ["ingress"]}, False),
    (("monitoring", STRANGER), "dispatcher", 8081, {}, False),
    (("monitoring", STRANGER), "dispatcher", 8081, {"monitoringNamespaces": ["monitoring"]}, True),
    (("monitoring", STRANGER), "api", 8080, {"monitoringNamespaces": ["monitoring"]}, True),
    ((NAMESPACE, STRANGER), "dispatcher", 8081, {"enabled": False}, True),
]


@pytest.mark.parametrize(("source", "target", "port", "values", "expected"), CASES)
def test_pods_talk_to_whom_they_must(source: Any, target: Any, port: Any, values: Any, expected: bool) -> None:
    objects = render({"networkPolicy": values}, scenario="minimal")
    ends = _ends(objects)
    first, second = (ends.get(end, end) if isinstance(end, str) else end for end in (source, target))
    assert allowed(objects, first, second, port) is expected


def test_the_api_lets_runners_in() -> None:
    """What Ray's pods may reach, policies of their own say."""
    objects = render(scenario="minimal")
    ends = _ends(objects)
    assert _agrees(objects, "Ingress", ends["api"], ends["runner"], 8080, "TCP")
    assert not _agrees(objects, "Ingress", ends["dispatcher"], ends["runner"], 8081, "TCP")


@pytest.mark.parametrize("protocol", ["UDP", "TCP"])
def test_names_can_be_looked_up(protocol: str) -> None:
    objects = render(scenario="minimal")
    ends = _ends(objects)
    for name in ("api", "dispatcher", "migrations", "smoke"):
        assert allowed(objects, ends[name], ("kube-system", {"k8s-app": "kube-dns"}), 53, protocol)
    assert not allowed(objects, ends["postgresql"], ("kube-system", {"k8s-app": "kube-dns"}), 53, protocol)


def test_the_bundled_database_is_there_for_those_who_need_it() -> None:
    objects = render(
        {"postgresql": {"enabled": True}, "networkPolicy": {"databaseTo": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}}
    )
    ends = _ends(objects)
    for name in ("api", "dispatcher", "migrations"):
        assert allowed(objects, ends[name], ends["postgresql"], 5432)
        assert not allowed(objects, ends[name], PRIVATE, 5432)
    for other in (ends["smoke"], ends["runner"], (NAMESPACE, STRANGER), ("ingress", STRANGER)):
        assert not allowed(objects, other, ends["postgresql"], 5432)
    assert not allowed(objects, ends["postgresql"], HUB, 443)


def test_a_pod_of_the_release_without_a_policy_may_nothing() -> None:
    objects = render(scenario="minimal")
    labels = find(objects, "NetworkPolicy", "demo-merger")["spec"]["podSelector"]["matchLabels"]
    forgotten = (NAMESPACE, {**labels, "app.kubernetes.io/component": "forgotten"})
    assert not allowed(objects, forgotten, HUB, 443)
    assert not allowed(objects, ("ingress", STRANGER), forgotten, 80)


def test_the_migrations_have_their_policy_when_they_run_and_not_after() -> None:
    hook = find(render(scenario="minimal"), "NetworkPolicy", "-migrations")["metadata"]["annotations"]
    assert hook["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert int(hook["helm.sh/hook-weight"]) < 0
    beside = find(render({"postgresql": {"enabled": True}}), "NetworkPolicy", "-migrations")["metadata"]
    assert "annotations" not in beside


def test_without_policies_there_are_none() -> None:
    assert every(render(scenario="minimal"), "NetworkPolicy")
    assert not every(render({"networkPolicy": {"enabled": False}}, scenario="minimal"), "NetworkPolicy")
