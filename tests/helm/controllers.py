"""What Kubernetes' controllers do: Deployments, StatefulSets, Jobs and RayClusters become pods that a node runs.

Knows when pods are made and removed, new ones ready before old ones go; a node (pretended in `pods.py`, real in
`kubelet.py`) runs them. Knows nothing of HTTP and of helm.
"""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tests.helm import ray_pods
from tests.helm.api_server.admission import Admission, Refusal
from tests.helm.api_server.kinds import BY_NAME
from tests.helm.api_server.store import Object, Store
from tests.helm.pods import is_ready, phase

HASH = "pod-template-hash"


class Node(Protocol):
    """Runs pods. Both calls return at once; what becomes of a pod is written in its status."""

    def start(self, pod: Object) -> None: ...

    def stop(self, pod: Object) -> None: ...


class Controllers:
    """A thread that brings what is there to what is wanted, at every change."""

    def __init__(self, store: Store, admission: Admission, node: Node) -> None:
        self._store, self._admission, self._node = store, admission, node
        self._started: set[str] = set()
        self._stopped: set[str] = set()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end, which the store's closing brings. Raises what went wrong in the thread."""
        self._thread.join()
        if self.failure:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._store.closed:
                seen = self._store.version
                self._round()
                self._store.wait(seen, 60)
        except BaseException as error:
            self.failure = error
            self._store.close()

    def _round(self) -> None:
        self._collect()
        for claim in self._store.all("PersistentVolumeClaim"):
            self._status(claim, phase="Bound")
        for each in self._store.all("RayCluster"):
            self._ray_cluster(each)
        for each in self._store.all("Deployment"):
            self._deployment(each)
        for each in self._store.all("ReplicaSet"):
            self._replica_set(each)
        for each in self._store.all("StatefulSet"):
            self._stateful_set(each)
        for each in self._store.all("Job"):
            self._job(each)
        for pod in self._store.all("Pod"):
            self._pod(pod)

    def _collect(self) -> None:
        """Remove what has lost its owner."""
        living = {each["metadata"]["uid"] for kind in BY_NAME for each in self._store.all(kind)}
        for kind in ("ReplicaSet", "Pod", "Service", "Secret"):
            for each in self._store.all(kind):
                owners = each["metadata"].get("ownerReferences") or []
                if owners and not any(owner["uid"] in living for owner in owners):
                    self._delete(each)

    def _delete(self, thing: Object) -> None:
        if not thing["metadata"].get("deletionTimestamp"):
            self._admission.delete(BY_NAME[thing["kind"]], thing)

    def _status(self, thing: Object, **fields: Any) -> None:
        def change(each: Object) -> None:
            each["status"] = (each.get("status") or {}) | fields

        self._store.change(thing["kind"], thing["metadata"]["namespace"], thing["metadata"]["name"], change)

    def _owned(self, kind: str, owner: Object) -> list[Object]:
        every = self._store.all(kind, owner["metadata"]["namespace"])
        uid = owner["metadata"]["uid"]
        return [each for each in every if any(o["uid"] == uid for o in each["metadata"].get("ownerReferences") or [])]

    def _make(self, owner: Object, kind: str, name: str, body: Mapping[str, Any]) -> bool:
        """Create an object of an owner's. Whether the server took it; what it said is in the owner's status."""
        reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"]}
        reference |= {"uid": owner["metadata"]["uid"], "controller": True}
        meta = {**(body.get("metadata") or {}), "name": name, "ownerReferences": [reference]}
        made = {"apiVersion": BY_NAME[kind].api_version, "kind": kind, **body, "metadata": meta}
        try:
            self._admission.create(BY_NAME[kind], owner["metadata"]["namespace"], made)
        except Refusal as refusal:
            failure = {"type": "ReplicaFailure", "status": "True", "message": refusal.message}
            self._status(owner, conditions=[failure])
            return False
        return True

    # ---- kinds ----

    def _deployment(self, wanted: Object) -> None:
        spec, meta = wanted["spec"], wanted["metadata"]
        digest = _digest(spec["template"])
        sets = self._owned("ReplicaSet", wanted)
        new = next((each for each in sets if each["metadata"]["labels"][HASH] == digest), None)
        if new is None:
            self._make(wanted, "ReplicaSet", f"{meta['name']}-{digest}", _replica_set(spec, digest))
            return
        old = [each for each in sets if each is not new]
        self._roll(spec, new, old)
        pods = [pod for each in sets for pod in self._owned("Pod", each)]
        ready = sum(map(is_ready, pods))
        updated = len(self._owned("Pod", new))
        available = {"type": "Available", "status": "True" if ready >= spec["replicas"] else "False"}
        counts = {"replicas": len(pods), "readyReplicas": ready, "availableReplicas": ready, "updatedReplicas": updated}
        conditions = [] if ready < spec["replicas"] and (wanted.get("status") or {}).get("conditions") else [available]
        more = {"conditions": conditions} if conditions else {}
        self._status(wanted, observedGeneration=meta["generation"], **counts, **more)

    def _roll(self, spec: Object, new: Object, old: list[Object]) -> None:
        """Give the new set what the old ones leave, and take from the old ones what the new one's ready pods allow."""
        replicas = spec["replicas"]
        surge, unavailable = _limits(spec)
        left = sum(len(self._owned("Pod", each)) for each in old)
        ready = sum(map(is_ready, self._owned("Pod", new)))
        self._scale(new, max(0, min(replicas, replicas + surge - left)))
        keep = 0 if spec["strategy"]["type"] == "Recreate" else max(0, replicas - unavailable - ready)
        for each in old:
            share = min(keep, each["spec"]["replicas"])
            self._scale(each, share)
            keep -= share
            if not share and not self._owned("Pod", each) and len(old) > 10:
                self._delete(each)

    def _scale(self, thing: Object, replicas: int) -> None:
        def change(each: Object) -> None:
            each["spec"]["replicas"] = replicas

        self._store.change(thing["kind"], thing["metadata"]["namespace"], thing["metadata"]["name"], change)

    def _replica_set(self, wanted: Object) -> None:
        pods = [pod for pod in self._owned("Pod", wanted) if not pod["metadata"].get("deletionTimestamp")]
        replicas = wanted["spec"]["replicas"]
        for _ in range(replicas - len(pods)):
            name = f"{wanted['metadata']['name']}-{_next_name(wanted, self._store)}"
            if not self._make(wanted, "Pod", name, wanted["spec"]["template"]):
                break
        for pod in sorted(pods, key=is_ready)[: max(0, len(pods) - replicas)]:
            self._delete(pod)
        ready = sum(map(is_ready, pods))
        generation = wanted["metadata"]["generation"]
        self._status(wanted, replicas=len(pods), readyReplicas=ready, observedGeneration=generation)

    def _stateful_set(self, wanted: Object) -> None:
        spec, meta = wanted["spec"], wanted["metadata"]
        digest = _digest(spec["template"])
        for claim in spec.get("volumeClaimTemplates") or []:
            for i in range(spec["replicas"]):
                self._claim(wanted, claim, f"{claim['metadata']['name']}-{meta['name']}-{i}")
        for i in range(spec["replicas"]):
            name = f"{meta['name']}-{i}"
            pod = self._store.get("Pod", meta["namespace"], name)
            if pod is None:
                self._make(wanted, "Pod", name, _member(spec, name, digest))
            elif pod["metadata"]["labels"][HASH] != digest:
                self._delete(pod)
            if pod is None or not is_ready(pod):
                break
        pods = self._owned("Pod", wanted)
        ready = sum(map(is_ready, pods))
        updated = sum(pod["metadata"]["labels"][HASH] == digest for pod in pods)
        counts = {"replicas": len(pods), "readyReplicas": ready, "updatedReplicas": updated, "currentReplicas": updated}
        self._status(wanted, observedGeneration=meta["generation"], **counts)

    def _claim(self, owner: Object, template: Object, name: str) -> None:
        if not self._store.get("PersistentVolumeClaim", owner["metadata"]["namespace"], name):
            claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}}
            kind = BY_NAME["PersistentVolumeClaim"]
            self._admission.create(kind, owner["metadata"]["namespace"], claim | {"spec": template["spec"]})

    def _job(self, wanted: Object) -> None:
        spec, meta = wanted["spec"], wanted["metadata"]
        if any(each["status"] == "True" for each in (wanted.get("status") or {}).get("conditions") or []):
            return
        phases = [phase(pod) for pod in self._owned("Pod", wanted)]
        failed, done = phases.count("Failed"), phases.count("Succeeded")
        if done:
            self._status(wanted, succeeded=done, failed=failed, conditions=[{"type": "Complete", "status": "True"}])
        elif failed > spec.get("backoffLimit", 6):
            reason = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}
            self._status(wanted, failed=failed, conditions=[reason])
        elif failed == len(phases):
            labels = {"batch.kubernetes.io/job-name": meta["name"], "job-name": meta["name"]}
            template = spec["template"]
            body = template | {"metadata": _labelled(template, labels)}
            self._make(wanted, "Pod", f"{meta['name']}-{failed}", body)

    def _ray_cluster(self, wanted: Object) -> None:
        for name, body in ray_pods.services(wanted).items():
            if not self._store.get("Service", wanted["metadata"]["namespace"], name):
                self._make(wanted, "Service", name, body)
        # One after another, the head first: Ray nodes that start at once on one machine confuse each other.
        for name, body in ray_pods.pods(wanted).items():
            pod = self._store.get("Pod", wanted["metadata"]["namespace"], name)
            if pod is None:
                self._make(wanted, "Pod", name, body)
            if pod is None or not is_ready(pod):
                break

    def _pod(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if uid not in self._started:
            self._started.add(uid)
            meta = pod["metadata"]
            self._store.change(
                "Pod", meta["namespace"], meta["name"], lambda each: each["spec"].update(nodeName="loop")
            )
            self._node.start(pod)
        elif pod["metadata"].get("deletionTimestamp") and uid not in self._stopped:
            self._stopped.add(uid)
            self._node.stop(pod)


def _replica_set(spec: Object, digest: str) -> Object:
    selector = {"matchLabels": (spec["selector"].get("matchLabels") or {}) | {HASH: digest}}
    template = spec["template"] | {"metadata": _labelled(spec["template"], {HASH: digest})}
    labels = template["metadata"]["labels"]
    return {"metadata": {"labels": labels}, "spec": {"replicas": 0, "selector": selector, "template": template}}


def _member(spec: Object, name: str, digest: str) -> Object:
    """A pod of a StatefulSet, with its claims as volumes."""
    claims = [each["metadata"]["name"] for each in spec.get("volumeClaimTemplates") or []]
    volumes = [{"name": each, "persistentVolumeClaim": {"claimName": f"{each}-{name}"}} for each in claims]
    pod = spec["template"]["spec"]
    pod = pod | {"volumes": (pod.get("volumes") or []) + volumes, "hostname": name}
    return {"metadata": _labelled(spec["template"], {HASH: digest}), "spec": pod}


def _labelled(template: Object, labels: Mapping[str, str]) -> Object:
    meta = template.get("metadata") or {}
    return {**meta, "labels": (meta.get("labels") or {}) | dict(labels)}


def _digest(template: Object) -> str:
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]


def _limits(spec: Object) -> tuple[int, int]:
    """How many pods more and how many fewer than wanted a rollout may have."""
    limits = spec["strategy"].get("rollingUpdate") or {"maxSurge": 0, "maxUnavailable": "100%"}
    surge = _share(limits["maxSurge"], spec["replicas"], math.ceil)
    unavailable = _share(limits["maxUnavailable"], spec["replicas"], math.floor)
    return surge, unavailable or (0 if surge else 1)


def _share(limit: int | str, replicas: int, rounded: Callable[[float], int]) -> int:
    return limit if isinstance(limit, int) else rounded(int(limit.removesuffix("%")) * replicas / 100)


def _next_name(owner: Object, store: Store) -> int:
    names = {each["metadata"]["name"] for each in store.all("Pod", owner["metadata"]["namespace"])}
    i = owner["metadata"].get("generation", 0)
    while f"{owner['metadata']['name']}-{i}" in names:
        i += 1
    return i
