"""A small third-party distribution, as pip installs one: a module and a dist-info folder with its entry points."""

import os
from pathlib import Path

IMPORTED = """
import os, pathlib
if os.environ.get("IMPORTED"):  # leave a trace: who imports this?
    with open(os.environ["IMPORTED"], "a") as file:
        file.write(__name__ + "\\n")
"""


def install(site: Path, module: str, source: str, entries: dict[str, dict[str, str]]) -> dict[str, str]:
    """Install a module into `site` under entry points {group: {name: object}}; returns the environment that finds it."""
    name = module.replace("_", "-")
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(source + IMPORTED)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = (f"[{group}]\n" + "".join(f"{n} = {o}\n" for n, o in each.items()) for group, each in entries.items())
    (info / "entry_points.txt").write_text("\n".join(groups))
    return {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
