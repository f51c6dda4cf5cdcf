"""NOTES.txt says how to reach what was installed and what is missing. A copy of the chart shows it."""

from pathlib import Path

import pytest

from tests.helm.cases import BUNDLED, INGRESSES, LOAD_BALANCER, OWN_KEYS, POLICIES_OFF, ROUTES, Values, merged
from tests.helm.chart import changed, find, render

NOTES: dict[str, tuple[Values, Values, str]] = {
    "if .Values.ingress.enabled": (INGRESSES, {}, "MERGER_URL=http://merger.example.org\n"),
    "range .Values.ingress.hosts": (INGRESSES, {}, "http://merger.example.org"),
    "if $.Values.ingress.tls": (
        merged(INGRESSES, {"ingress": {"tls": [{"secretName": "tls"}]}}),
        INGRESSES,
        "https://",
    ),
    "if and .Values.httpRoute.enabled .Values.httpRoute.hostnames": (
        merged(ROUTES, {"httpRoute": {"hostnames": ["route.example.org"]}}),
        ROUTES,
        "https://route.example.org",
    ),
    'if eq .Values.service.type "LoadBalancer"': (LOAD_BALANCER, {}, "loadBalancer.ingress"),
    'if eq .Values.service.type "NodePort"': ({"service": {"type": "NodePort"}}, LOAD_BALANCER, "nodePort"),
    "if .Values.smoke.enabled": ({}, {"smoke": {"enabled": False}}, "helm -n models test demo"),
    "if .Values.postgresql.enabled": (BUNDLED, {}, "single pod for trials"),
    "if not (and .Values.auth.apiKey.existingSecret .Values.auth.secretKeys.existingSecret)": (
        {},
        OWN_KEYS,
        "demo-merger-keys: keep a copy",
    ),
    'if not (or .Values.ingress.enabled .Values.httpRoute.enabled (ne .Values.service.type "ClusterIP"))': (
        {},
        LOAD_BALANCER,
        "within the cluster only",
    ),
    "if not .Values.networkPolicy.enabled": (POLICIES_OFF, {}, "Network policies are off"),
    "if not .Values.migrations.enabled": ({"migrations": {"enabled": False}}, {}, "Migrations are off"),
    "range $missing": ({}, merged(OWN_KEYS, LOAD_BALANCER), "  - "),
}


def _notes(folder: Path, values: Values) -> str:
    """What NOTES.txt says: in a copy of the chart it is a value of an object."""
    chart = changed(folder, {})
    text = (chart / "templates" / "NOTES.txt").read_text()
    (chart / "templates" / "notes.yaml").write_text(
        '{{- define "notes" }}'
        + text
        + '{{ end -}}\nkind: Notes\nmetadata: {name: notes}\ntext: {{ include "notes" . | quote }}\n'
    )
    notes: str = find(render(values, scenario="minimal", chart=chart), "Notes")["text"]
    return notes


@pytest.mark.parametrize("condition", NOTES)
def test_notes_say_what_holds(tmp_path: Path, condition: str) -> None:
    on, off, text = NOTES[condition]
    assert text in _notes(tmp_path / "on", on)
    assert text not in _notes(tmp_path / "off", off)


def test_notes_lead_to_the_key_and_to_the_first_job(tmp_path: Path) -> None:
    notes = _notes(tmp_path, {"auth": {"apiKey": {"existingSecret": "own", "key": "first.key"}}})
    assert "get secret own -o go-template='{{index .data \"first.key\" | base64decode}}'" in notes
    assert "merger submit recipe.yaml --wait" in notes
    assert "port-forward service/demo-merger-api 8080:8080" in notes
