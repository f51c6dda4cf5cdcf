"""The loopback kubelet does with small pods what a kubelet does: so what the chart's pods do there means something."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.helm.api_server.admission import address_of
from tests.helm.api_server.kinds import BY_NAME
from tests.helm.api_server.store import Object
from tests.helm.containers import Substitution, expanded
from tests.helm.kubelet import Kubelet
from tests.helm.loopback import NAMESPACE, Cluster
from tests.service.processes import until

SERVE = (
    "import http.server as h, os, sys\n"
    "class Web(h.BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        self.send_response(200); self.end_headers(); self.wfile.write(os.environ['WORD'].encode())\n"
    "h.ThreadingHTTPServer(('0.0.0.0', 8080), Web).serve_forever()\n"
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path / "cluster", Kubelet)
    found.put("ConfigMap", "nothing")
    yield found
    found.node.close()
    found.close()


def container(script: str, **fields: Any) -> Object:
    return {"name": "main", "image": "x", "command": ["python", "-c", script], **fields}


def pod(cluster: Cluster, script: str, fields: dict[str, Any] | None = None, **spec: Any) -> None:
    whole = {"restartPolicy": "Never", "containers": [container(script, **(fields or {}))]} | spec
    cluster.put("Pod", "one", spec=whole)


def ended(cluster: Cluster) -> str:
    def look() -> str | None:
        phase = ((cluster.get("Pod", "one") or {}).get("status") or {}).get("phase")
        return phase if phase in ("Succeeded", "Failed") else None

    return str(cluster.store.until(look, 30))


def web(word: str) -> Object:
    labels = {"app": "web"}
    env = [{"name": "WORD", "value": word}]
    probe = {"httpGet": {"path": "/", "port": "http"}}
    ports = [{"name": "http", "containerPort": 8080}]
    # What was sent to a pod just before it leaves is still answered.
    leave = {"preStop": {"exec": {"command": ["sleep", "0.5"]}}}
    main = container(SERVE, env=env, ports=ports, readinessProbe=probe, lifecycle=leave)
    template = {"metadata": {"labels": labels}, "spec": {"containers": [main]}}
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    return {"replicas": 2, "selector": {"matchLabels": labels}, "strategy": strategy, "template": template}


@pytest.mark.parametrize(("code", "phase"), [(0, "Succeeded"), (3, "Failed")])
def test_a_pod_ends_as_its_process_does(code: int, phase: str, cluster: Cluster) -> None:
    pod(cluster, f"print('seen'); raise SystemExit({code})")
    assert ended(cluster) == phase
    assert "seen" in cluster.node.log("one")


def test_variables_come_from_secrets_maps_and_fields(cluster: Cluster) -> None:
    cluster.put("Secret", "s", stringData={"k": "hidden"})
    cluster.put("ConfigMap", "m", data={"FROM_MAP": "shown"})
    env = [
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        {"name": "B", "value": "$(A)-$(FROM_MAP)-$(NONE)"},
        {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]
    fields = {"env": env, "envFrom": [{"configMapRef": {"name": "m"}}]}
    pod(cluster, "import os; print(os.environ['B'], os.environ['C'])", fields)
    assert ended(cluster) == "Succeeded"
    assert "hidden-shown-$(NONE) one" in cluster.node.log("one")


def test_a_pod_waits_for_the_secret_that_it_names(cluster: Cluster) -> None:
    env = [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]
    pod(cluster, "pass", {"env": env})
    cluster.store.until(lambda: "not found" in str((cluster.get("Pod", "one") or {}).get("status")))
    cluster.put("Secret", "s", stringData={"k": "late"})
    assert ended(cluster) == "Succeeded"


def test_init_containers_come_first_and_share_volumes(cluster: Cluster) -> None:
    mount = [{"name": "v", "mountPath": "/shared"}]
    first = container("open('/shared/a', 'w').write('from before')", volumeMounts=mount) | {"name": "first"}
    volumes = [{"name": "v", "emptyDir": {}}]
    pod(cluster, "print(open('/shared/a').read())", {"volumeMounts": mount}, initContainers=[first], volumes=volumes)
    assert ended(cluster) == "Succeeded"
    assert "from before" in cluster.node.log("one")


def test_a_pod_that_takes_too_long_has_failed(cluster: Cluster) -> None:
    pod(cluster, "import time; time.sleep(600)", activeDeadlineSeconds=1)
    assert ended(cluster) == "Failed"


def test_new_pods_are_ready_before_old_ones_leave_and_the_service_never_fails(cluster: Cluster) -> None:
    ports = [{"port": 80, "targetPort": "http"}]
    cluster.put("Service", "web", spec={"selector": {"app": "web"}, "ports": ports})
    made = cluster.put("Deployment", "web", spec=web("old"))
    cluster.settle()
    url = f"http://{address_of(cluster.store, NAMESPACE, 'web')}/"
    assert httpx2.get(url).text == "old"

    kind = BY_NAME["Deployment"]
    live = cluster.get("Deployment", "web") or made
    cluster.admission.replace(kind, live, live | {"spec": web("new")})
    said = []
    until(lambda: said.append(httpx2.get(url).text) or (said[-1] == "new" and not cluster.waits_for()))
    assert set(said) <= {"old", "new"}
    assert len(cluster.all("Pod")) == 2


def test_what_stands_in_a_pod_becomes_what_stands_here(cluster: Cluster) -> None:
    cluster.put("Service", "web", spec={"selector": {"app": "web"}, "ports": [{"port": 80}]})
    put = Substitution(
        cluster.store, NAMESPACE, {"/models": Path("/here"), "/models/deep": Path("/there")}, "127.1.2.3"
    )
    address = address_of(cluster.store, NAMESPACE, "web")
    assert put("/models:/models/deep/x:/modelsx") == "/here:/there/x:/modelsx"
    assert put("http://web:80 http://web.models.svc http://webx") == f"http://{address}:80 http://{address} http://webx"
    assert put("0.0.0.0") == "127.1.2.3"
    assert expanded("$(A) $$(A) $(B)", {"A": "1"}) == "1 $$(A) $(B)"
