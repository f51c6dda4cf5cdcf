"""Keeps what a release of the chart renders, for the test that the next one can take its place.

    python -m tests.helm.released.record

writes `tests/helm/released/<version>/<scenario>.yaml` for the version of `helm/Chart.yaml`. Run it when a version is
released, and never again for that version. Knows nothing of what may change.
"""

from pathlib import Path

import yaml

from tests.helm.chart import CHART, Object, render

FOLDER = Path(__file__).parent
SCENARIOS = ("minimal", "production", "all-on")


def recorded(scenario: str) -> list[Object]:
    """The objects of a scenario as they are rendered now, generated secrets made equal."""
    objects = render(scenario=scenario)
    for each in objects:
        if each["kind"] == "Secret":
            each["data"] = dict.fromkeys(each.get("data") or {}, "cmVjb3JkZWQ=")
    return sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"]))


def main() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    (FOLDER / version).mkdir(exist_ok=True)
    for scenario in SCENARIOS:
        path = FOLDER / version / f"{scenario}.yaml"
        path.write_text(yaml.safe_dump_all(recorded(scenario), sort_keys=True, width=120))


if __name__ == "__main__":
    main()
