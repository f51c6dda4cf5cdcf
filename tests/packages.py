"""Packages with tasks of their own, installed into folders as pip would leave them: modules and a dist-info."""

import os
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs" / "evaluation.md"


def install(folder: Path, name: str, version: str, tasks: dict[str, str], **modules: str) -> Path:
    """Install `modules` (name to source) as distribution `name`, whose entry points are `tasks`; the folder."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    entries = "\n".join(f"{task} = {value}" for task, value in tasks.items())
    (info / "entry_points.txt").write_text(f"[merger.training]\n{entries}\n")
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
    return folder


def margins(folder: Path, version: str = "1.0") -> Path:
    """The example of the documentation, installed."""
    block = re.search(r"    # merger_margins\.py\n((?:    .*\n|\n)+)", DOCS.read_text())
    assert block, "the documentation has no example"
    source = re.sub(r"^    ", "", block[1], flags=re.MULTILINE)
    return install(folder, "merger-margins", version, {"margins": "merger_margins:Margins"}, merger_margins=source)


# Classification that stops in the middle of a fine-tuning, in the first process that comes there after the file `hold`
# was put into its folder; `held` then has the process's id.
_HELD = """
import os
import threading
from contextlib import suppress
from pathlib import Path

from merger.tasks import Classification


class Held(Classification):
    def __init__(self):
        self._steps = 0

    def loss(self, model, batch):
        self._steps += next(model.base_model.parameters()).requires_grad
        if self._steps == 5 and Path("hold").exists():
            own = Path(f"held-{os.getpid()}")
            own.write_text(str(os.getpid()))
            with suppress(FileExistsError):
                os.link(own, "held")
                threading.Event().wait()
        return super().loss(model, batch)
"""
HELD_AFTER = 4  # steps of the whole model


def held(folder: Path) -> Path:
    """The task `held`, installed."""
    return install(folder, "held", "1.0", {"held": "merger_held:Held"}, merger_held=_HELD)


def path_with(site: Path) -> str:
    """A PYTHONPATH with what is installed in a folder, before what it has already."""
    return os.pathsep.join([str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
