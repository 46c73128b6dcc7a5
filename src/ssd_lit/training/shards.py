"""Checkpoints in the folders of torch.distributed.checkpoint: sealed with checksums, and read whole by one process."""

import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from ssd_lit.support.files import SHARDS, read_json_checked, write_json_checked

STATE = "meta.pt"
"""What is not divided: Lightning's name of the file."""
CHUNK = 2**24


def unsealed_folder(path: Path) -> Path:
    """A new temporary folder beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    folder.chmod(0o755)
    return folder


def seal(folder: Path) -> None:
    """Write the sizes and CRC-32s of all files of a folder into one file, which carries a digest of its own."""
    files = sorted(file for file in folder.iterdir() if file.name != SHARDS)
    write_json_checked(folder / SHARDS, {file.name: [size, crc] for file, (size, crc) in _sums(files).items()})


def check_shards(folder: Path) -> None:
    """Raise ValueError if a file of a sealed folder is missing or damaged."""
    sealed = read_json_checked(folder / SHARDS)
    found = _sums([folder / name for name in sealed if (folder / name).is_file()])
    for name, (size, crc) in sealed.items():
        if found.get(folder / name) != (size, crc):
            raise ValueError(f"{folder}: damaged (the checksum of {name} does not fit)")


def read_shards(folder: Path, *, mapped: bool) -> dict[str, Any]:
    """The content of a sealed folder without its moments, on the CPU; if `mapped` without the weights too."""
    content: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    if not mapped:
        weights: dict[str, Any] = {}
        _load_state_dict(
            weights,
            storage_reader=FileSystemReader(folder),
            planner=_EmptyStateDictLoadPlanner(keys={"state_dict"}),
            no_dist=True,
        )
        content |= weights
    return content


def _sums(files: list[Path]) -> dict[Path, tuple[int, int]]:
    """Size and CRC-32 of each file. Files are read side by side: one core sums up 1 to 2 GB a second."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(_sum, files), strict=True))


def _sum(file: Path) -> tuple[int, int]:
    crc = 0
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
        return content.tell(), crc
