"""Finds the Ray cluster of a rendered chart, and values that change it. Knows nothing of what they should be."""

from typing import Any

from tests.helm.chart import Object, find, render


def cluster_of(values: Object | None = None, **more: Any) -> Object:
    """The RayCluster, in the least scenario unless another is named."""
    return find(render(values, **{"scenario": "minimal", **more}), "RayCluster")


def pods_of(ray: Object) -> dict[str, Object]:
    """The pods' specifications by the names of their groups, and `head`."""
    groups = {group["groupName"]: group for group in ray["spec"]["workerGroupSpecs"]}
    nodes = {"head": ray["spec"]["headGroupSpec"], **groups}
    return {name: node["template"]["spec"] for name, node in nodes.items()}


def group_of(ray: Object, name: str = "cpu") -> Object:
    """A group of workers."""
    [found] = [each for each in ray["spec"]["workerGroupSpecs"] if each["groupName"] == name]
    return found


def with_group(values: Object, name: str = "cpu") -> Object:
    """The chart's values where a group's are these."""
    return {"ray": {"groups": {name: values}}}


def fixed(**values: Any) -> Object:
    """Ray's values where there is no autoscaler, and the group's are these."""
    return {"autoscaling": {"enabled": False}, "groups": {"cpu": values}}


def settings_of(values: Object | None = None, **more: Any) -> dict[str, str]:
    """The service's plain settings."""
    data: dict[str, str] = find(render(values, **{"scenario": "minimal", **more}), "ConfigMap", "-settings")["data"]
    return data
