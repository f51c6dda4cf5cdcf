"""What KubeRay's operator makes of a RayCluster: its services, its pods, and the command that starts Ray in them.

Knows what operator 1.7 sets by itself (from its documentation and source); knows nothing of how pods are run.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

Object = dict[str, Any]
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}


def services(cluster: Object) -> dict[str, Object]:
    """The head's service, without an address of its own as KubeRay makes it."""
    name = cluster["metadata"]["name"]
    ports = [{"name": each, "port": port, "targetPort": port} for each, port in PORTS.items()]
    labels = {"ray.io/cluster": name, "ray.io/node-type": "head"}
    return {f"{name}-head-svc": {"metadata": {"labels": labels}, "spec": {"selector": labels, "ports": ports}}}


def pods(cluster: Object) -> dict[str, Object]:
    """The head and the workers that the groups ask for, by name."""
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    if spec.get("suspend"):
        return {}
    found = {f"{name}-head": _pod(cluster, "head", spec["headGroupSpec"], "headgroup")}
    for group in spec.get("workerGroupSpecs") or []:
        for i in range(_count(group)):
            found[f"{name}-{group['groupName']}-worker-{i}"] = _pod(cluster, "worker", group, group["groupName"])
    return found


def _count(group: Object) -> int:
    low, high = group.get("minReplicas") or 0, group.get("maxReplicas")
    wanted = max(group.get("replicas") or 0, low)
    return min(wanted, high) if high is not None else wanted


def _pod(cluster: Object, type: str, group: Object, group_name: str) -> Object:
    name, template = cluster["metadata"]["name"], copy.deepcopy(group["template"])
    meta = template.setdefault("metadata", {})
    labels = {"ray.io/cluster": name, "ray.io/node-type": type, "ray.io/group": group_name}
    meta["labels"] = (meta.get("labels") or {}) | labels
    ray = template["spec"]["containers"][0]
    ray["command"] = ["/bin/bash", "-c", "--"]
    ray["args"] = [f"ulimit -n 65536; {start_command(cluster, type, group)}"]
    ray["env"] = [*(ray.get("env") or []), *_environment(cluster, type, ray)]
    # The operator's own probe; its times are those of the loopback kubelet.
    ray.setdefault("readinessProbe", {"httpGet": {"path": "/api/healthz", "port": 52365}})
    template["spec"].setdefault("restartPolicy", "Never")
    return template


def start_command(cluster: Object, type: str, group: Object) -> str:
    """`ray start` with the group's parameters and those that KubeRay adds."""
    return f"ray start {' '.join(_options(cluster, type, group))}"


def _options(cluster: Object, type: str, group: Object) -> Iterator[str]:
    parameters = dict(group.get("rayStartParams") or {})
    if type == "head":
        yield "--head"
        parameters.setdefault("dashboard-host", "0.0.0.0")
        parameters.setdefault("port", str(PORTS["gcs-server"]))
    else:
        parameters["address"] = f"{cluster['metadata']['name']}-head-svc:{PORTS['gcs-server']}"
    parameters |= _resources(group)
    parameters.setdefault("metrics-export-port", "8080")
    parameters.setdefault("dashboard-agent-listen-port", "52365")
    parameters["block"] = "true"
    if group.get("labels"):
        parameters["labels"] = ",".join(f"{key}={value}" for key, value in group["labels"].items())
    for key, value in sorted(parameters.items()):
        yield f"--{key}" if value == "true" and key in ("block", "disable-usage-stats") else f"--{key}={value}"


def _resources(group: Object) -> Mapping[str, str]:
    """Processors and memory: the group's `resources` first, else the container's limits."""
    said, given = dict(group.get("resources") or {}), dict(group.get("rayStartParams") or {})
    limits = (group["template"]["spec"]["containers"][0].get("resources") or {}).get("limits") or {}
    names = {"num-cpus": ("CPU", "cpu"), "num-gpus": ("GPU", "nvidia.com/gpu"), "memory": ("memory", "memory")}
    found = {}
    for option, (resource, limit) in names.items():
        value = said.pop(resource, None) or (limits.get(limit) if option not in given else None)
        if value is not None:
            found[option] = _number(str(value), whole=True)
    if said:
        found["resources"] = f"'{json.dumps({key: float(value) for key, value in said.items()})}'"
    return found


def _number(text: str, whole: bool) -> str:
    from tests.helm.api_server.rules import quantity

    value = quantity(text)
    return str(int(-(-value // 1))) if whole else str(value)


def _environment(cluster: Object, type: str, container: Object) -> Iterator[Object]:
    """Variables that the operator adds where the template does not set them."""
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    known = {each["name"] for each in container.get("env") or []}
    host = "127.0.0.1" if type == "head" else f"{name}-head-svc"
    values = {"RAY_CLUSTER_NAME": name, "RAY_IP": host, "FQ_RAY_IP": host, "RAY_PORT": str(PORTS["gcs-server"])}
    values |= {"RAY_ADDRESS": f"{host}:{PORTS['gcs-server']}", "RAY_USAGE_STATS_KUBERAY_IN_USE": "1"}
    values |= {"RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1", "RAY_TIMEOUT_MS_TASK_WAIT_FOR_DEATH_INFO": "0"}
    auth = spec.get("authOptions") or {}
    if auth.get("mode"):
        values["RAY_AUTH_MODE"] = auth["mode"]
    yield from ({"name": key, "value": value} for key, value in values.items() if key not in known)
    if auth.get("mode") == "token" and "RAY_AUTH_TOKEN" not in known:
        secret = {"name": auth.get("secretName") or name, "key": "auth_token"}
        yield {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": secret}}
