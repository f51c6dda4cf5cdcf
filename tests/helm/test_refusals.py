"""What cannot work is refused before anything is made, with what to do; keys that were made stay. Knows no objects."""

import base64
import re
from pathlib import Path

import pytest

from tests.helm.cases import BUNDLED, INGRESSES, KEDA, ROUTES, SCALED, TRIGGERS, Values, merged
from tests.helm.chart import Object, Refused, changed, find, render

REFUSALS: list[tuple[str, Values, str, Values]] = [
    ("if gt (len $name) 40", {"fullnameOverride": "m" * 41}, "41 characters", {"fullnameOverride": "m" * 40}),
    (
        'if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name)',
        {"nameOverride": "other", "release": "1st"},
        "no name for a Service",
        {"nameOverride": "other", "release": "first"},
    ),
    (
        "if and .Values.postgresql.enabled .Values.database.existingSecret",
        {"postgresql": {"enabled": True}},
        "two databases",
        BUNDLED,
    ),
    (
        "if not (or .Values.postgresql.enabled .Values.database.existingSecret)",
        {"database": {"existingSecret": ""}},
        "no database",
        {},
    ),
    (
        "if and .enabled (gt (int .minReplicas) (int .maxReplicas))",
        {"api": {"autoscaling": {"enabled": True, "minReplicas": 7}}},
        "above maxReplicas",
        {"api": {"autoscaling": {"enabled": True, "minReplicas": 6}}},
    ),
    (
        "if and .enabled $.Values.api.autoscaling.enabled",
        merged(KEDA, SCALED),
        "would scale the same pods",
        KEDA,
    ),
    ("with .Values.api.keda", merged(KEDA, SCALED), "would scale the same pods", KEDA),
    ("if and .enabled (not .triggers)", {"api": {"keda": {"enabled": True}}}, "needs api.keda.triggers", KEDA),
    (
        "if and .enabled (gt (int .minReplicas) (int .maxReplicas))",
        {"api": {"keda": {"enabled": True, **TRIGGERS, "minReplicas": 9}}},
        "above maxReplicas",
        {"api": {"keda": {"enabled": True, **TRIGGERS, "minReplicas": 0}}},
    ),
    ("with .Values.api.autoscaling", {"api": {"autoscaling": {"enabled": True, "minReplicas": 7}}}, "above", SCALED),
    (
        'if and .Values.api.autoscaling.enabled (not (dig "requests" "cpu" "" .Values.api.resources))',
        merged(SCALED, {"api": {"resources": {"requests": {"cpu": None}}}}),
        "requests.cpu is not set",
        {"api": {"resources": {"requests": {"cpu": None}}}},
    ),
    (
        "if lt (float64 .Values.api.terminationGracePeriodSeconds) (addf .Values.api.preStopSeconds $grace)",
        {"api": {"terminationGracePeriodSeconds": 24}},
        "settings.grace_seconds: 25 and more",
        {"api": {"terminationGracePeriodSeconds": 25}},
    ),
    (
        "if lt (float64 .Values.dispatcher.terminationGracePeriodSeconds) (float64 $grace)",
        {"dispatcher": {"terminationGracePeriodSeconds": 19}},
        "settings.grace_seconds: 20 and more",
        {"dispatcher": {"terminationGracePeriodSeconds": 20}},
    ),
    (
        'if and .Values.service.nodePort (eq .Values.service.type "ClusterIP")',
        {"service": {"nodePort": 30080}},
        "nodePort needs",
        {"service": {"nodePort": 30080, "type": "NodePort"}},
    ),
    (
        'if and (ne .Values.service.type "LoadBalancer") '
        "(or .Values.service.loadBalancerClass .Values.service.loadBalancerSourceRanges)",
        {"service": {"loadBalancerClass": "balancer"}},
        "need service.type LoadBalancer",
        {"service": {"loadBalancerClass": "balancer", "type": "LoadBalancer"}},
    ),
    (
        "if and .Values.ingress.enabled (not .Values.ingress.hosts)",
        merged(INGRESSES, {"ingress": {"hosts": []}}),
        "needs ingress.hosts",
        INGRESSES,
    ),
    ("if .Values.httpRoute.enabled", {"httpRoute": {"enabled": True}}, "parentRefs", {"httpRoute": {"enabled": False}}),
    (
        "if not .Values.httpRoute.parentRefs",
        merged(ROUTES, {"httpRoute": {"parentRefs": []}}),
        "needs httpRoute.parentRefs",
        ROUTES,
    ),
    (
        'if not (.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1/HTTPRoute")',
        {**ROUTES, "capabilities": ["ray.io/v1/RayCluster"]},
        "Gateway API's resources",
        ROUTES,
    ),
    (
        "if and .Values.networkPolicy.enabled (or .Values.ingress.enabled .Values.httpRoute.enabled) "
        "(not (or .Values.networkPolicy.ingressNamespaces .Values.networkPolicy.ingressFrom))",
        merged(INGRESSES, {"networkPolicy": {"ingressNamespaces": []}}),
        "name its namespace",
        merged(INGRESSES, {"networkPolicy": {"ingressNamespaces": [], "ingressFrom": [{"podSelector": {}}]}}),
    ),
    (
        'if and .enabled (not ($.Capabilities.APIVersions.Has "keda.sh/v1alpha1/ScaledObject"))',
        {**KEDA, "capabilities": ("ray.io/v1/RayCluster",)},
        "needs KEDA",
        KEDA,
    ),
    ("if $wrong", {"database": {"existingSecret": ""}}, "There is no database", {}),
]


def _tried(values: Values) -> list[Object]:
    values = dict(values)
    release, capabilities = values.pop("release", "demo"), values.pop("capabilities", None)
    more = {"capabilities": capabilities} if capabilities else {}
    return render(values, scenario="minimal", release=release, **more)


@pytest.mark.parametrize(
    ("condition", "wrong", "message", "right"), REFUSALS, ids=lambda each: each if isinstance(each, str) else ""
)
def test_what_cannot_work_is_refused(condition: str, wrong: Values, message: str, right: Values) -> None:
    with pytest.raises(Refused, match=re.escape(message)):
        _tried(wrong)
    assert _tried(right)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(Refused) as refusal:
        render({"service": {"nodePort": 30080}, "api": {"terminationGracePeriodSeconds": 1}})
    for message in ("no database", "nodePort needs", "terminationGracePeriodSeconds"):
        assert message in str(refusal.value)


# ---- what is looked up in the cluster: `helm template` finds nothing, so a copy of the chart is told ----

LOOKUPS = {'with lookup "v1" "Secret" $.Release.Namespace .', "if not $url", 'if hasPrefix "sqlite" $url'}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"url": "postgresql://merger@database/merger"}, ""),
        ({"other": "postgresql://merger@database/merger"}, "has no key url"),
        ({"url": "sqlite:///jobs.db"}, "one of SQLite"),
    ],
)
def test_the_databases_secret_is_looked_at(tmp_path: Path, held: dict[str, str], message: str) -> None:
    data = " ".join(f'"{key}" "{base64.b64encode(text.encode()).decode()}"' for key, text in held.items())
    found = f'dict "data" (dict {data})'
    lookup = 'lookup "v1" "Secret" $.Release.Namespace .'
    chart = changed(tmp_path, {"_validation.tpl": (lookup, found)})
    if message:
        with pytest.raises(Refused, match=message):
            render(scenario="minimal", chart=chart)
    else:
        assert render(scenario="minimal", chart=chart)


def test_keys_that_were_made_stay(tmp_path: Path) -> None:
    found = '(dict "data" (dict "api-key" "a2VwdA=="))'
    chart = changed(tmp_path, {"_settings.tpl": ('lookup "v1" "Secret" .root.Release.Namespace .secret', found)})
    data = find(render(scenario="minimal", chart=chart), "Secret", "-keys")["data"]
    assert data["api-key"] == "a2VwdA=="
    assert len(base64.urlsafe_b64decode(base64.b64decode(data["secret-keys"]))) == 32
