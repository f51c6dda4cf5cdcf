"""Values that tests of the chart lay over the scenario `minimal`. Knows nothing of what they show."""

from collections.abc import Mapping
from typing import Any

Values = dict[str, Any]

BUNDLED: Values = {"database": {"existingSecret": ""}, "postgresql": {"enabled": True}}
POLICIES_OFF: Values = {"networkPolicy": {"enabled": False}}
LOAD_BALANCER: Values = {"service": {"type": "LoadBalancer"}}
SCALED: Values = {"api": {"autoscaling": {"enabled": True}}}
TRIGGERS: Values = {"triggers": [{"type": "cron", "metadata": {"desiredReplicas": "4"}}]}
KEDA: Values = {"api": {"keda": {"enabled": True, **TRIGGERS}}}
TRACED: Values = {"monitoring": {"telemetry": {"enabled": True, "endpoint": "http://collector:4318"}}}
INGRESSES: Values = {
    "ingress": {"enabled": True, "hosts": ["merger.example.org"]},
    "networkPolicy": {"ingressNamespaces": ["ingress"]},
}
ROUTES: Values = {
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]},
    "networkPolicy": {"ingressNamespaces": ["ingress"]},
}
OWN_KEYS: Values = {"auth": {"apiKey": {"existingSecret": "own"}, "secretKeys": {"existingSecret": "own"}}}


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> Values:
    """Values over others, as helm lays them."""
    both = dict(first)
    for name, value in second.items():
        old = both.get(name)
        both[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def nested(path: str, value: Any) -> Values:
    """The values in which this one stands at a path such as `api.replicas`."""
    first, _, rest = path.partition(".")
    return {first: nested(rest, value) if rest else value}
