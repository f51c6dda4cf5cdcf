"""Who may talk to Ray's pods, and to whom they may."""

from typing import Any

from tests.helm.chart import Object, every, find, render
from tests.helm.cluster import cluster_of, pods_of


def _policy(values: Object | None, name: str, **more: Any) -> Object:
    found: Object = find(render(values, **{"scenario": "minimal", **more}), "NetworkPolicy", name)["spec"]
    return found


def _ports(rules: list[Object]) -> set[Any]:
    return {port["port"] for rule in rules for port in rule.get("ports", [])}


def test_the_head_takes_jobs_from_the_service_alone() -> None:
    [rule] = _policy(None, "-ray-head")["ingress"]
    assert _ports([rule]) == {8265}
    components = [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in rule["from"][:2]]
    assert components == ["api", "dispatcher"]
    [values] = [expression["values"] for expression in rule["from"][2]["namespaceSelector"]["matchExpressions"]]
    assert values == ["kuberay-system"]
    [without] = _policy({"networkPolicy": {"operatorNamespaces": []}}, "-ray-head")["ingress"]
    assert len(without["from"]) == 2


def test_nobody_reaches_ray_client() -> None:
    for policy in every(render(scenario="all-on"), "NetworkPolicy"):
        assert 10001 not in _ports(policy["spec"].get("ingress", []))
    [among] = [rule for rule in _policy(None, "-merger-ray")["ingress"] if "ports" not in rule]
    [peer] = among["from"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "ray"


def test_ports_of_policies_are_ports_of_pods() -> None:
    names = {port["containerPort"] for pod in pods_of(cluster_of()).values() for port in pod["containers"][0]["ports"]}
    values = {"networkPolicy": {"monitoringNamespaces": ["m"]}}
    told = _ports(_policy(values, "-ray-head")["ingress"]) | _ports(_policy(values, "-merger-ray")["ingress"])
    assert told == {8265, 8080, 44217, 44227}
    assert told <= names
    assert _ports(_policy(None, "-merger-ray")["ingress"]) == set()


def test_workers_do_not_reach_the_database() -> None:
    values = {"networkPolicy": {"databasePort": 5433}}
    for policy in ("-merger-ray", "-ray-head"):
        rules = _policy(values, policy)["egress"]
        assert 5433 not in _ports(rules)
    # Only pods of the release, name servers and HTTPS: the one rule without ports is for Ray's own pods.
    [open_rule] = [rule for rule in _policy(None, "-merger-ray")["egress"] if "ports" not in rule]
    assert open_rule["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "ray"
    assert _ports(_policy(None, "-merger-ray")["egress"]) == {53, 443, 8080}


def test_the_autoscaler_reaches_kubernetes() -> None:
    [rule] = [rule for rule in _policy(None, "-ray-head")["egress"] if 6443 in _ports([rule])]
    assert "to" not in rule
    named = _policy({"networkPolicy": {"apiServerCIDRs": ["10.0.0.1/32"]}}, "-ray-head")["egress"]
    [rule] = [rule for rule in named if 6443 in _ports([rule])]
    assert rule["to"] == [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    assert 6443 not in _ports(_policy({"ray": {"autoscaling": {"enabled": False}}}, "-ray-head")["egress"])


def test_the_head_reaches_redis() -> None:
    redis = {"ray": {"gcsFaultTolerance": {"backend": "redis", "redis": {"address": "r:6380"}}}}
    assert 6380 in _ports(_policy(redis, "-ray-head")["egress"])
    plain = {"ray": {"gcsFaultTolerance": {"backend": "redis", "redis": {"address": "r"}}}}
    assert 6379 in _ports(_policy(plain, "-ray-head")["egress"])
    assert 6379 not in _ports(_policy(None, "-ray-head")["egress"])


def test_policies_and_an_external_cluster() -> None:
    assert every(render({"networkPolicy": {"enabled": False}}, scenario="minimal"), "NetworkPolicy", "-ray") == []
    assert every(render(scenario="external-ray"), "NetworkPolicy", "-ray-head") == []
    assert 8265 in _ports(_policy(None, "-dispatcher", scenario="external-ray")["egress"])
    secured = {"ray": {"external": {"url": "https://ray.example.org"}, "auth": {"enabled": False}}}
    assert 443 in _ports(_policy(secured, "-dispatcher")["egress"])
    assert 8265 not in _ports(_policy(secured, "-dispatcher")["egress"])
