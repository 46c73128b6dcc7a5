"""Files by glob patterns, over trees in which links may go round."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path


def matching_paths(pattern: str) -> Iterator[str]:
    """What a glob pattern matches, in no order; `**` stands for any folders, without following links to them.

    The standard library's own `**` follows links: two of them that lead upwards would keep it busy for ever.
    """
    before, stars, behind = _parted(pattern)
    if not stars:
        yield from glob.iglob(pattern)  # noqa: PTH207  # Path.glob takes no absolute patterns
        return
    for root in glob.iglob(before) if before else ["."]:  # noqa: PTH207
        for folder, inside, _ in os.walk(root):
            inside[:] = [name for name in inside if not name.startswith(".")]
            yield from matching_paths(os.path.normpath(Path(glob.escape(folder), behind or "*")))


def _parted(pattern: str) -> tuple[str, str, str]:
    """What stands before the first part `**` of a pattern, that part, and what stands behind it."""
    parts = pattern.split("/")
    if "**" not in parts:
        return pattern, "", ""
    place = parts.index("**")
    return "/".join([*parts[:place], ""]), "**", "/".join(parts[place + 1 :])
