"""Where the chart's pods find models: the same paths in the service's pods and in Ray's, in every mode."""

import re
from pathlib import PurePosixPath
from typing import Any

import pytest

from api.settings import Settings
from tests.helm.chart import Object, Refused, every, find, render
from tests.helm.cluster import cluster_of, pods_of

MODES = {"volume": "minimal", "objects": "objects", "hub": "hub-only"}


def _service(component: str, values: Object | None = None, **more: Any) -> Object:
    deployment = find(render(values, **{"scenario": "minimal", **more}), "Deployment", component)
    pod: Object = deployment["spec"]["template"]["spec"]
    return pod


def _variables(pod: Object) -> dict[str, str]:
    return {each["name"]: each["value"] for each in pod["containers"][0]["env"] if "value" in each}


def _volume(pod: Object, name: str) -> Object | None:
    found = [volume for volume in pod["volumes"] if volume["name"] == name]
    return found[0] if found else None


def _mount(pod: Object, name: str) -> str | None:
    found = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == name]
    return found[0] if found else None


def _everywhere(values: Object | None = None, **more: Any) -> list[Object]:
    """The pods that plan and the pods that work."""
    ray = pods_of(cluster_of(values, **more))
    return [_service("-api", values, **more), *ray.values()]


def _settings(pod: Object, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The service's own reading of a pod's variables."""
    for name, value in _variables(pod).items():
        monkeypatch.setenv(name, value)
    return Settings()


# ---- the modes ----------------------------------------------------------------------------------------


def test_a_volume_is_one_for_all() -> None:
    claim = find(render(scenario="minimal"), "PersistentVolumeClaim", "-models")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in _everywhere():
        volume = _volume(pod, "models")
        assert volume
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        assert _mount(pod, "models") == "/models"


@pytest.mark.parametrize("mode", ["objects", "hub"])
def test_without_a_volume_there_is_scratch_alone(mode: str) -> None:
    assert every(render(scenario=MODES[mode]), "PersistentVolumeClaim") == []
    for pod in _everywhere(scenario=MODES[mode]):
        assert _volume(pod, "models") is None
        assert _mount(pod, "models") is None
        assert _mount(pod, "scratch") == "/scratch"


@pytest.mark.parametrize("mode", MODES)
def test_the_service_reads_what_the_mode_says(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _settings(_service("-api", scenario=MODES[mode]), monkeypatch)
    folder = "/models" if mode == "volume" else "/scratch"
    root = "/models" if mode == "volume" else "/scratch/work"
    assert str(settings.working_folder) == folder
    assert [*map(str, settings.source_roots)] == [*map(str, settings.output_roots)] == [root]
    assert settings.shared_folders is (mode == "volume")
    addresses = ("s3://team-models/", "s3://team-results/merged") if mode == "objects" else ()
    assert settings.object_roots == addresses


@pytest.mark.parametrize("mode", MODES)
def test_jobs_reach_no_cache(mode: str) -> None:
    """What others have downloaded lies there, gated models too."""
    for pod in _everywhere({"storage": {"modelCache": {"enabled": True}}}, scenario=MODES[mode]):
        variables = _variables(pod)
        roots = variables.get("MERGER_SOURCE_ROOTS", "/models").split(":")
        for name in ("HF_HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TMPDIR", "HOME"):
            place = PurePosixPath(variables[name])
            assert not any(place.is_relative_to(root) for root in roots), name


@pytest.mark.parametrize("mode", MODES)
def test_the_working_folder_is_there_when_a_runner_starts(mode: str) -> None:
    folder = _variables(_service("-api", scenario=MODES[mode]))["MERGER_WORKING_FOLDER"]
    for pod in pods_of(cluster_of(scenario=MODES[mode])).values():
        assert folder in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}


def test_folders_of_the_volume_may_be_narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = {"mountPath": "/data", "sourceRoots": ["/data/in", "/data/more"], "outputRoots": ["/data/out"]}
    settings = _settings(_service("-api", {"storage": {"volume": volume}}), monkeypatch)
    assert [*map(str, settings.source_roots)] == ["/data/in", "/data/more"]
    assert [*map(str, settings.output_roots)] == ["/data/out"]
    assert str(settings.working_folder) == "/data"


# ---- object stores and the Hub ------------------------------------------------------------------------


def test_all_pods_open_the_same_buckets() -> None:
    for pod in _everywhere(scenario="objects"):
        variables = _variables(pod)
        assert variables["AWS_REGION"] == "eu-central-1"
        assert variables["AWS_ENDPOINT_URL"] == "https://minio.example.org"
        assert {"secretRef": {"name": "bucket-keys"}} in pod["containers"][0]["envFrom"]
    for pod in _everywhere():
        assert not any("secretRef" in each for each in pod["containers"][0].get("envFrom", []))
        assert "AWS_REGION" not in _variables(pod)


def test_buckets_beside_a_volume() -> None:
    values = {"storage": {"objects": {"roots": ["gs://team/"]}}}
    assert _variables(_service("-api", values))["MERGER_OBJECT_ROOTS"] == "gs://team/"
    assert "MERGER_OBJECT_ROOTS" not in _variables(_service("-api"))


def test_all_pods_ask_the_same_hub() -> None:
    for pod in _everywhere(scenario="hub-only"):
        assert _variables(pod)["HF_ENDPOINT"] == "https://hub.example.org"
    assert all("HF_ENDPOINT" not in _variables(pod) for pod in _everywhere())


# ---- scratch and cache --------------------------------------------------------------------------------


def test_scratch_is_bounded_or_a_volume_of_its_own() -> None:
    worker = pods_of(cluster_of())["cpu"]
    assert _volume(worker, "scratch") == {"name": "scratch", "emptyDir": {"sizeLimit": "50Gi"}}
    worker = pods_of(cluster_of(scenario="objects"))["cpu"]
    scratch = _volume(worker, "scratch")
    assert scratch
    spec = scratch["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert spec == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "local-nvme",
        "resources": {"requests": {"storage": "500Gi"}},
    }
    values = {"storage": {"scratch": {"kind": "ephemeral"}}}
    scratch = _volume(pods_of(cluster_of(values))["cpu"], "scratch")
    assert scratch
    assert "storageClassName" not in scratch["ephemeral"]["volumeClaimTemplate"]["spec"]


def test_a_group_has_scratch_of_its_own() -> None:
    pods = pods_of(cluster_of(scenario="gpu"))
    sizes = {}
    for name in ("cpu", "highmem"):
        scratch = _volume(pods[name], "scratch")
        assert scratch
        spec = scratch["ephemeral"]["volumeClaimTemplate"]["spec"]
        sizes[name] = (spec["resources"]["requests"]["storage"], spec["storageClassName"])
    assert sizes == {"cpu": ("200Gi", "local-nvme"), "highmem": ("500Gi", "local-nvme")}


def test_the_head_and_the_service_need_little() -> None:
    assert _volume(pods_of(cluster_of(scenario="objects"))["head"], "scratch") == {
        "name": "scratch",
        "emptyDir": {"sizeLimit": "1Gi"},
    }
    assert _volume(_service("-api"), "scratch") == {"name": "scratch", "emptyDir": {"sizeLimit": "2Gi"}}


def test_a_model_cache_is_shared() -> None:
    values = {"storage": {"modelCache": {"enabled": True}}}
    claim = find(render(values, scenario="minimal"), "PersistentVolumeClaim", "-cache")
    for pod in _everywhere(values):
        volume = _volume(pod, "model-cache")
        assert volume
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        assert _variables(pod)["HF_HOME"] == _mount(pod, "model-cache") == "/model-cache"
    for pod in _everywhere():
        assert _volume(pod, "model-cache") is None
        assert _variables(pod)["HF_HOME"] == "/scratch/huggingface"


# ---- claims -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "name"), [("volume", "-models"), ("modelCache", "-cache")])
def test_a_claim_is_made_as_it_is_asked_for(part: str, name: str) -> None:
    def claim(**values: Any) -> Object:
        values = {"enabled": True, **values} if part == "modelCache" else values
        return find(render({"storage": {part: values}}, scenario="minimal"), "PersistentVolumeClaim", name)

    assert claim(keep=True)["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "annotations" not in claim(keep=False)["metadata"]
    assert claim(keep=False, annotations={"a": "b"})["metadata"]["annotations"] == {"a": "b"}
    assert claim(storageClassName="nfs", size="7Ti")["spec"]["storageClassName"] == "nfs"
    assert "storageClassName" not in claim()["spec"]
    assert claim(size="7Ti")["spec"]["resources"] == {"requests": {"storage": "7Ti"}}


def test_a_claim_of_ones_own_is_used() -> None:
    values = {
        "storage": {"volume": {"existingClaim": "ours"}, "modelCache": {"enabled": True, "existingClaim": "cached"}}
    }
    assert every(render(values, scenario="minimal"), "PersistentVolumeClaim") == []
    for pod in _everywhere(values):
        claims = {
            each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each
        }
        assert claims == {"ours", "cached"}


# ---- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "told"),
    [
        ({"mode": "objects"}, "storage.objects.roots is empty"),
        ({"mode": "nfs"}, "storage.mode"),
        ({"objects": {"roots": ["http://bucket/"]}}, "storage.objects.roots"),
        ({"scratch": {"mountPath": "/models"}}, "mounted at one path"),
        ({"modelCache": {"enabled": True, "mountPath": "/scratch"}}, "mounted at one path"),
        ({"volume": {"sourceRoots": ["/modelsandmore"]}}, "does not lie below"),
        ({"volume": {"outputRoots": ["/etc"]}}, "does not lie below"),
        ({"volume": {"accessModes": []}}, "storage.volume.accessModes"),
        ({"scratch": {"kind": "hostPath"}}, "storage.scratch.kind"),
        ({"volume": {"clam": "x"}}, "clam"),
    ],
)
def test_what_cannot_work_is_refused(storage: Object, told: str) -> None:
    with pytest.raises(Refused, match=re.escape(told)):
        render({"storage": storage}, scenario="minimal")
