"""`ssd-lit init` and `ssd-lit list`: a project of one's own, and the experiments that there are."""

import glob
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ssd_lit.config import ConfigError
from ssd_lit.config.experiment import KEPT_NAMES
from ssd_lit.config.yaml_file import parse_yaml, read_layers
from ssd_lit.support.devices import count_gpus
from ssd_lit.support.files import write_text
from ssd_lit.support.shipped import CONFIGS, WORKFLOW

SizeName = Literal["cpu", "gpu"]
TEMPLATES = Path(__file__).parent / "templates"
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "told": "About 0.8 M parameters beside the embeddings: minutes an arm on two cores.",
        "vocab_size": 2048, "sequence_length": 128, "layers": 4, "d_model": 128, "heads": 4, "d_ff": 512, "experts": 16,
        "optim": "{lr: 3e-3, warmup_steps: 50}", "steps": 600, "batch_size": 16, "training": ["checkpoint_every: 50"],
    },
    "gpu": {
        "told": "25 M parameters beside the embeddings: minutes an arm on one GPU.",
        "vocab_size": 16384, "sequence_length": 512, "layers": 8, "d_model": 512, "heads": 8, "d_ff": 2048,
        "experts": 32,
        "optim": "{lr: 1e-3, warmup_steps: 200, schedule: wsd}  # the decay falls into the last dense phase",
        "steps": 2000, "batch_size": 64,
        "training": [
            "precision: bf16", "compile: true", "# devices: 4  # GPUs that train a run together",
            "validate_every: 250", "checkpoint_every: 250",
        ],
    },
}  # fmt: skip
"""The values of a project's first experiment, for a machine without and with a GPU."""


def init(folder: Path, text: Sequence[Path], size: SizeName | None) -> str:
    """Make a project: Snakefile, experiment.yaml, Makefile, profiles; returns what to do next.

    The experiment reads `text`, files or folders, else the project's folder text/. Raises ConfigError if the folder
    holds something, or if text is not there or of no kind that is read.
    """
    import jinja2

    from ssd_lit.data.readers import check_format

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists already; give a new folder")
    for path in text:
        if not path.exists():
            raise ConfigError(f"--text {path}: no such file or folder")
        if path.is_file():
            check_format(path)
    size = size or ("gpu" if count_gpus() else "cpu")
    name = re.sub(r"[^a-z0-9_.]+", "_", folder.resolve().name.lower()).strip("_.")[:60] or "experiment"
    name += "_experiment" if name in KEPT_NAMES else ""
    named = name if parse_yaml(name) == name else json.dumps(name)
    template = jinja2.Template((TEMPLATES / "experiment.yaml.j2").read_text("utf-8"), keep_trailing_newline=True)
    # A file's path is a pattern there, a folder's is not.
    paths = [str(path.resolve()) if path.is_dir() else glob.escape(str(path.resolve())) for path in text] or ["text"]
    write_text(
        folder / "experiment.yaml",
        template.render(name=named, paths=json.dumps(paths, ensure_ascii=False), size=SIZES[size]),
    )
    for file, target in (("Snakefile", "Snakefile"), ("Makefile", "Makefile"), ("gitignore", ".gitignore")):
        write_text(folder / target, (TEMPLATES / file).read_text("utf-8"))
    shutil.copytree(WORKFLOW / "profiles", folder / "profiles")
    if not text:
        (folder / "text").mkdir()
    steps = [
        f"cd {shlex.quote(str(folder))}",
        *([] if text else ["cp YOUR.txt text/"]),
        "ssd-lit plan experiment.yaml",
        "snakemake",
    ]
    return f"{folder}: a project for a {size.upper()}; next:\n" + "".join(f"  {step}\n" for step in steps)


class Listed(NamedTuple):
    """An experiment in a line."""

    name: str
    """What `snakemake --config experiment=` and `ssd-lit plan` take."""
    runs: int
    asked: str
    """The first sentence of its description."""


def experiments() -> Iterator[Listed]:
    """The experiments here, in this folder and its configs/, and then those that ship; the nearest to the top first."""
    own = Path("configs")
    here = [*Path().glob("*.yaml"), *own.rglob("*.yaml")]
    shipped = [] if own.resolve() == CONFIGS.resolve() else [*CONFIGS.rglob("*.yaml")]
    for files in (here, shipped):
        for path in sorted(files, key=lambda path: (len(path.parts), path)):
            root = next((root for root in (own, CONFIGS) if path.is_relative_to(root)), None)
            name = str(path if root is None else path.relative_to(root).with_suffix(""))
            if (listed := _listed(name, path)) is not None:
                yield listed


def _listed(name: str, path: Path) -> Listed | None:
    """The line of a file, None if it is no experiment; what it reads need not be there."""
    try:
        content, _ = read_layers(path)
    except ConfigError:
        return None
    arms = content.get("arms")
    if "experiment" not in content or not isinstance(arms, dict):
        return None
    grids = [arm.get("grid", {}) for arm in arms.values() if isinstance(arm, dict)]
    try:
        runs = len(content.get("seeds", [0])) * sum(math.prod(map(len, grid.values())) for grid in grids)
    except (TypeError, AttributeError):  # a mistake in it, which is told where it is run
        return None
    return Listed(name, runs, re.split(r"(?<=[.?])\s", " ".join(str(content.get("description", "")).split()))[0])


def show_experiments() -> None:
    """Print `experiments`, one line each."""
    from ssd_lit.support.console import console, table

    shown = table("experiment", "runs", "what it asks", numbers=("runs",), cut="what it asks")
    for listed in experiments():
        shown.add_row(listed.name, str(listed.runs), listed.asked)
    console().print(shown)
    console().print("`ssd-lit plan NAME` says what one will take, `snakemake --config experiment=NAME` runs it.")
