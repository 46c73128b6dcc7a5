"""Bad input of every kind, each with the line that it is answered with; and anything at all, which must get one too.

Nothing a person gives may end in a traceback, in silence or in waiting.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import math
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssd_lit.cli import main
from ssd_lit.config import ConfigError, FilesSource
from ssd_lit.data.documents import normalise
from ssd_lit.data.index import load_index
from ssd_lit.data.sources import documents
from ssd_lit.data.tokenizer import load_tokenizer

QUICK = Path(__file__).parents[1] / "configs/quick.yaml"


def told_by(arguments: list[str], directory: Path) -> tuple[int, str]:
    """The exit status of the command line, run in a directory, and what it said on stderr."""
    said = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = main(arguments)
        except SystemExit as called_wrongly:
            status = int(called_wrongly.code or 0)
    return status, said.getvalue()


def quick(**changes: Any) -> dict[str, Any]:
    """The quick experiment with changes by dotted key."""
    content: dict[str, Any] = yaml.safe_load(QUICK.read_text(encoding="utf-8"))
    content["optim"]["lr"] = 3e-3
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    return content


class Settings(NamedTuple):
    """Changes to the quick experiment, by dotted key."""

    changes: dict[str, Any]

    def told(self, folder: Path) -> tuple[int, str]:
        return File(yaml.safe_dump(quick(**self.changes))).told(folder)


class File(NamedTuple):
    """The content of a config file."""

    content: str | bytes

    def told(self, folder: Path) -> tuple[int, str]:
        content = self.content if isinstance(self.content, bytes) else self.content.encode()
        (folder / "wrong.yaml").write_bytes(content)
        return told_by(["configs", "wrong.yaml"], folder)


class Text(NamedTuple):
    """A text file, or what makes something in its place, as the only source of the quick experiment."""

    name: str
    content: bytes | Callable[[Path], None]
    paths: str = ""

    def told(self, folder: Path) -> tuple[int, str]:
        place = folder / self.name
        if isinstance(self.content, bytes):
            place.write_bytes(self.content)
        else:
            self.content(place)
        sources = [{"kind": "files", "paths": [self.paths or self.name]}]
        (folder / "text.yaml").write_text(yaml.safe_dump(quick(**{"data.sources": sources})), encoding="utf-8")
        status, told = told_by(["configs", "text.yaml"], folder)
        if status:
            return status, told
        data = next((folder / "results/data").iterdir())
        for stage in ("prepare", "tokenizer", "encode"):
            status, told = told_by([stage, str(data), "--threads", "1"], folder)
            if status:
                break
        return status, told


class Command(NamedTuple):
    """A command line, in a folder with the quick experiment's resolved configs."""

    line: str
    before: Callable[[Path], None] = lambda folder: None

    def told(self, folder: Path) -> tuple[int, str]:
        told_by(["configs", str(QUICK)], folder)
        self.before(folder)
        return told_by(self.line.split(), folder)


def parquet(table: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    return file.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


def unreadable(path: Path) -> None:
    # Permissions would not keep an administrator from reading.
    path.symlink_to("/proc/self/mem")


def rings(path: Path) -> None:
    """A folder of text with two links to itself: there are 2^n ways to go n folders deep."""
    path.mkdir()
    (path / "a").symlink_to(".")
    (path / "b").symlink_to("../d")
    (path / "text.txt").write_bytes(WORDS)


def a_file(folder: Path) -> None:
    (folder / "taken").write_text("")


def cut(content: bytes) -> Callable[[Path], None]:
    """Something else in the place of the config of RUN."""
    return lambda folder: write(folder / RUN / "config.yaml", content)


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


MANY = b"much text " * 999
WORDS = b"\n\n".join(b"a document with words, number %d" % n for n in range(400))
RUN, POSTHOC = "results/quick/runs/dense-seed0", "results/quick/runs/posthoc-seed0"
ACCENTS = ("e" + "\u0301\u0323" * 500_000).encode()
NO_TEXT = pyarrow.array([], pyarrow.string())
UPCYCLED = {"method": "upcycle", "parent_arm": "dense"}
ENDLESS = {"moe.top_k": [1] * 3000, "optim.lr": [1] * 3000}
SOURCE: dict[str, Any] = {"kind": "files", "paths": ["no/such/*.txt"]}

BAD: list[tuple[str, Settings | File | Text | Command, str]] = [
    # Settings: keys, types, ranges.
    ("an unknown key", Settings({"model.d_modle": 64}), "model.d_modle: unknown key; did you mean 'd_model'?"),
    ("an unknown section", Settings({"modle": {}}), "modle: unknown key; did you mean 'model'?"),
    ("a missing key", Settings({"training": {"batch_size": 8}}), "training.steps: missing; it must be given"),
    ("a word for a number", Settings({"model.layers": "four"}),
     "model.layers: given 'four'; input should be a valid int"),
    ("a truth for a number", Settings({"model.layers": True}), "model.layers: given True; input should be a valid int"),
    ("a half for a whole number", Settings({"model.layers": 2.5}),
     "model.layers: given 2.5; input should be a valid int"),
    ("nothing for a number", Settings({"model.layers": None}), "model.layers: given None; input should be a valid int"),
    ("a mapping for a number", Settings({"model.layers": {"a": 1}}), "model.layers: given {'a': 1}; input should be"),
    ("a list for a section", Settings({"model": [1]}), "model: given [1]; input should be a valid dictionary"),
    ("a number for a key", Settings({"model": {1: 2}}), "model.1.[key]: given 1; input should be a valid string"),
    ("a negative number", Settings({"training.steps": -5}), "training.steps: given -5; input should be greater than 0"),
    ("a huge number", Settings({"training.steps": 10**30}), "input should be less than or equal to 1000000000"),
    ("more layers than any model", Settings({"model.layers": 10**9}),
     "model.layers: given 1000000000; input should be"),
    ("not a number", Settings({"optim.lr": math.nan}), "optim.lr: given nan; input should be a finite number"),
    ("infinity", Settings({"optim.weight_decay": math.inf}), "optim.weight_decay: given inf; input should be a finite"),
    ("a share above one", Settings({"switching.tau": 1.5}),
     "switching.tau: given 1.5; input should be less than or equal"),
    ("a value of 100 kB", Settings({"model.family": "x" * 100_000}),
     "... (100,002 characters); input should be 'gpt2'"),
    # Settings: what does not go together.
    (
        "pieces of a batch",
        Settings({"training.micro_batch_size": 5}),
        "training.micro_batch_size 5 does not divide the",
    ),
    ("one device divided", Settings({"training.shard": True}), "training.shard true: there is one device only"),
    ("nodes", Settings({"training.nodes": 7}), "is not divisible by training.nodes times training.devices, 7"),
    ("d_ff not divisible", Settings({"model.d_ff": 10}), "10 is not divisible by moe.experts 8; allowed: 1, 2, 5, 10"),
    ("heads not divisible", Settings({"model.heads": 3}), "heads 3 does not divide d_model 64"),
    ("k above E", Settings({"moe.top_k": 9}), "top_k 9 is more than experts 8; allowed: 1 to 8"),
    ("k schedule above E", Settings({"moe.k_schedule": {"kind": "linear", "end": 9}}), "k_schedule.end 9 is more than"),
    ("budget below warm-up", Settings({"training.steps": 50}),
     "training.steps 50: must exceed switching.warmup_max_steps"),
    ("budget below LR warm-up", Settings({"training.steps": 9}),
     "optim.warmup_steps 10: must be below training.steps 9"),
    ("budget below warm-up and decay", Settings({"optim": {"warmup_steps": 9, "schedule": "wsd", "decay_fraction": 1}}),
     "steps after optim.warmup_steps 9 are more than training.steps"),
    ("no switch points", Settings({"switching.switch_points": []}),
     "switch_points: given []; list should have at least 1 item"),
    ("odd switch points", Settings({"switching.switch_points": [10]}), "switch_points [10]: expected an even number"),
    ("switch points that fall", Settings({"switching.switch_points": [50, 40]}),
     "switch_points [50, 40]: expected an even"),
    ("BERT without a mask", Settings({"model.family": "bert"}), "mask_token: true"),
    ("T5 with few sentinels", Settings({"model.family": "t5"}), "sentinels must be at least 3"),
    ("no such family", Settings({"model.family": "gpt5"}),
     "given 'gpt5'; input should be 'gpt2', 'bert', 't5', 'llama', 'opt'"),
    ("special tokens that do not fit", Settings({"data.tokenizer": {"vocab_size": 260, "sentinels": 9}}),
     "at least 266"),
    ("no tokenizer", Settings({"data.tokenizer": {"folder": "no/folder"}}),
     "failed: data.tokenizer.folder: no tokenizer.json in 'no/folder'"),
    ("no checkpoint", Settings({"model": {"pretrained": "no/folder"}}), "no config.json in folder 'no/folder'"),
    # Settings: names, seeds, sources.
    ("a name that leaves results/", Settings({"experiment": "../x"}), "given '../x'; string should match pattern"),
    ("an absolute name", Settings({"experiment": "/etc"}), "experiment: given '/etc'; string should match pattern"),
    ("the name of another folder", Settings({"experiment": "data"}), "results/data is not for experiments"),
    ("an arm that leaves results/", Settings({"arms": {"../x": {"method": "dense"}}}),
     "given '../x'; string should match"),
    ("data that leaves results/", Settings({"data.name": "a/b"}),
     "data.name: given 'a/b'; string should match pattern"),
    ("no seed", Settings({"seeds": []}), "seeds: given []; list should have at least 1 item"),
    ("a seed twice", Settings({"seeds": [0, 0]}), "seeds [0, 0]: each may stand there once"),
    ("a seed that no library takes", Settings({"seeds": [2**70]}), "seeds.0: given 1180591620717411303424"),
    ("no file matches", Settings({"data.sources": [SOURCE]}),
     "failed: data.sources.0.files: no file matches 'no/such/*.txt'"),
    ("a file whose name is too long", Settings({"data.sources": [{"kind": "files", "paths": ["x" * 5000]}]}),
     "failed: data.sources.0.files: no file matches 'xxx"),
    ("no file that is held out", Settings({"data.held_out": {"novel": "no.txt"}}),
     "failed: data.held_out.novel: no file 'no.txt'"),
    ("no source", Settings({"data.sources": []}), "data.sources: given []; list should have at least 1 item"),
    ("an unknown package", Settings({"data.sources": [{"kind": "package", "name": "sotus"}]}), "given 'sotus'; input"),
    ("an unknown kind of source", Settings({"data.sources": [{"kind": "web"}]}),
     "data.sources.0: given {'kind': 'web'}"),
    # Settings: arms.
    ("no arm", Settings({"arms": {}}), "arms: given {}; dictionary should have at least 1 item"),
    ("an arm of nothing", Settings({"arms": {"a": None}}), "arms.a: nothing to drop; without it there are: []"),
    ("an unknown method", Settings({"arms.ssd.method": "sdd"}),
     "arms.ssd.method: given 'sdd'; input should be 'dense'"),
    ("an arm's own mistake", Settings({"arms.ssd.moe": {"top_k": 99}}),
     "arms.ssd.moe: top_k 99 is more than experts 8"),
    ("an unknown arm", Settings({"arms.posthoc.parent_arm": "dnese"}),
     "arms.posthoc.parent_arm: given 'dnese'; allowed"),
    ("no arm to start from", Settings({"arms.posthoc": {"method": "posthoc"}}),
     "arms.posthoc.parent_arm: missing; allowed"),
    ("a gate in SSD", Settings({"arms.ssd.moe": {"router": "gate"}}),
     "not with method ssd; allowed: center, random"),
    ("a gate of one", Settings({"arms.sparse.moe": {"router": "gate", "top_k": 1}}),
     "moe.top_k 1: a learned router"),
    ("centres of copies", Settings({"arms.up": UPCYCLED}), "moe.router 'center': copies of one FFN share one centre"),
    ("upcycling SSD", Settings({"arms.up": {**UPCYCLED, "parent_arm": "ssd"}}), "given 'ssd'; allowed: ['dense']"),
    ("experts of fresh weights", Settings({"arms.sparse.moe": {"construction": "kmeans"}}),
     "allowed: random, contiguous"),
    ("a router nobody trains", Settings({"arms.dense.moe": {"posthoc_router": "mass_mlp"}}),
     "only methods ssd and posthoc"),
    ("matching oneself", Settings({"arms.dense.match_flops_of_arm": "dense"}),
     "arms.dense.match_flops_of_arm: given 'dense'; allowed"),
    ("FLOPs for SSD", Settings({"arms.ssd.match_flops_of_arm": "dense"}),
     "arms.ssd.match_flops_of_arm: only method dense"),
    ("a grid of no setting", Settings({"arms.ssd.grid": {"top_k": [1, 2]}}), "given 'top_k': 1; expected a dotted key"),
    ("a grid of no values", Settings({"arms.ssd.grid": {"moe.top_k": []}}), "arms.ssd.grid.moe.top_k: no values"),
    ("a grid's wrong value", Settings({"arms.ssd.grid": {"moe.top_k": [1, 99]}}),
     "arms.ssd.top_k_99.moe: top_k 99 is more"),
    ("a grid of long names", Settings({"arms.ssd.grid": {
        "switching.final_dense_steps": [7], "switching.sparse_fraction": [0.3], "switching.warmup_max_steps": [11]}}),
     "arms.ssd.grid: a combination would be called 'ssd.final_dense_steps_7.sparse_fraction_0.3.warmup_max_steps_11'"),
    ("a grid of equals", Settings({"arms.ssd.grid": {"moe.top_k": [1, 1]}}),
     "two combinations are both called 'ssd.top_k_1'"),
    ("a grid without end", Settings({"arms.ssd.grid": ENDLESS}), "make 9,000,003 runs; allowed: 10,000"),
    # Config files.
    ("an empty file", File("# nothing"), "wrong.yaml: the file is empty"),
    ("a list", File("- 1\n- 2"), "wrong.yaml: expected a mapping of keys to values"),
    ("bytes", File(bytes(range(256))), "wrong.yaml: not UTF-8 text"),
    ("UTF-16", File("a: 1".encode("utf-16")), "wrong.yaml: not UTF-8 text"),
    ("a null byte", File("a: \0"), "not valid YAML: unacceptable character #x0000"),
    ("a bracket left open", File("a: [1"), "not valid YAML: while parsing a flow sequence"),
    ("a tab", File("a:\n\tb: 1"), "found character that cannot start any token"),
    ("a key twice", File("a: 1\nb: {c: 1,\n c: 2}"), "line 3: key 'c' is given more than once"),
    ("a list as a key", File("? [1]\n: 2"), "found unhashable key"),
    ("two documents", File("a: 1\n---\na: 2"), "expected a single document"),
    ("a day that never was", File("a: 2025-02-30"), "not valid YAML: day is out of range for month"),
    ("a number of 5000 digits", File("a: " + "9" * 5000), "not valid YAML: Exceeds the limit (4300 digits)"),
    ("a tag that lies", File("a: !!bool maybe"), "not valid YAML: 'maybe'"),
    ("a tag that runs code", File("a: !!python/object/apply:os.system [ls]"), "could not determine a constructor"),
    ("an alias of nothing", File("a: *b"), "found undefined alias in \"<unicode string>\", line 1"),
    ("an anchor in itself", File("a: &a {b: [*a]}"), "line 1: an anchor that contains itself"),
    ("a billion laughs", File(laughs(9)), "more than 100,000 values: no config has as many"),
    ("brackets without end", File("[" * 5000), "not valid YAML: nested too deeply"),
    ("ten megabytes", File("a: " + "x" * 10_000_000), "more than 1,000,000 bytes: no config is as large"),
    ("a base that is missing", File("base: none.yaml"), "wrong.yaml: base: none.yaml: no such file"),
    ("a base that is no path", File("base: [1]"), "base: given [1]; expected a path or a list of paths"),
    ("a base that is a folder", File("base: ."), "base: .: not a file"),
    ("a base without end", File("base: /dev/zero"), "base: /dev/zero: not a file"),
    ("a base that is the file", File("base: ./wrong.yaml"), "./wrong.yaml builds on itself"),
    # Text files.
    ("an empty text", Text("a.txt", b""), "data.sources: no text in a.txt"),
    ("nothing but space", Text("a.txt", b" \n\t\r\n \n" * 99), "data.sources: no text in a.txt"),
    ("nothing but control characters", Text("a.txt", b"\x01\x02\n\n\x03"), "the sources hold no document with text"),
    ("one document", Text("a.txt", b"words"), "none of 1 documents falls in the validation split; give more text"),
    ("10 MB on one line", Text("a.txt", b"x" * 10_000_000), "none of 1 documents falls in the validation split"),
    ("a document of accents", Text("a.txt", ACCENTS), "none of 1 documents falls in the validation split"),
    ("splits below a block", Text("a.txt", b"\n\n".join([b"%d" % n for n in range(60)])),
     "give more text, a larger share"),
    ("junk", Text("a.txt", bytes(range(256)) * 99), "a.txt: not UTF-8 text (invalid start byte)"),
    ("junk behind 30 kB of text", Text("a.txt", WORDS * 2 + b"\xff"), "a.txt: not UTF-8 text (invalid start byte)"),
    ("a character cut in two", Text("a.txt", WORDS + b"\xc3"), "a.txt: not UTF-8 text (unexpected end of data)"),
    ("unmarked UTF-16", Text("a.txt", WORDS.decode().encode("utf-16-le")),
     "a.txt: not UTF-8 text (it seems to be UTF-16); allowed: UTF-8, or UTF-16 with a byte order mark"),
    ("UTF-16 cut short", Text("a.txt", WORDS.decode().encode("utf-16")[:-1]),
     "a.txt: not UTF-16-LE text (truncated data)"),
    ("no kind of text", Text("a.csv", b"x"), "a.csv: unknown kind of file; allowed: .txt, .jsonl, .ndjson, .json, "),
    ("an empty folder", Text("a.txt", Path.mkdir), "a.txt: no files to read; name files, as in"),
    ("a pipe for a file", Text("a.txt", os.mkfifo), "a.txt: no files to read"),
    ("a link to itself", Text("a.txt", lambda path: path.symlink_to("a.txt")), "a.txt"),
    ("a file that may not be read", Text("a.txt", unreadable), "a.txt: cannot be read: [Errno 5] Input/output error"),
    ("gzip cut short", Text("a.txt.gz", gzip.compress(MANY)[:-9]), "a.txt.gz: cannot be read: Compressed file ended"),
    ("gzip with a wrong bit", Text("a.txt.gz", flipped(gzip.compress(MANY), 20)), "a.txt.gz: cannot be read: Error -3"),
    ("no gzip", Text("a.txt.gz", b"none"), "a.txt.gz: cannot be read: Not a gzipped file"),
    ("bzip2 cut short", Text("a.txt.bz2", bz2.compress(MANY)[:-9]), "a.txt.bz2: cannot be read: Compressed file ended"),
    ("no bzip2", Text("a.txt.bz2", b"none"), "a.txt.bz2: cannot be read: Invalid data stream"),
    ("xz cut short", Text("a.txt.xz", lzma.compress(MANY)[:-9]), "a.txt.xz: cannot be read: Compressed file ended"),
    ("xz with a wrong bit", Text("a.txt.xz", flipped(lzma.compress(MANY), 40)), "a.txt.xz: cannot be read: Corrupt"),
    ("zstd cut short", Text("a.txt.zst", zstandard.compress(MANY)[:-5]), "a.txt.zst: cannot be read: Truncated"),
    ("no zstd", Text("a.txt.zst", b"none"), "a.txt.zst: cannot be read: ZSTD decompress failed"),
    ("no JSON", Text("a.jsonl", b'{"text": "x"}\n{"text'), "a.jsonl: line 2 is not valid JSON"),
    ("JSON without end", Text("a.jsonl", b"[" * 100_000), "a.jsonl: line 1 is not valid JSON (nested too deeply)"),
    ("JSON with a huge number", Text("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}"), "line 1 is not valid JSON (Exceeds"),
    ("no JSON object", Text("a.jsonl", b"[1]"),
     "a.jsonl: line 1 is not a JSON object but of type list; expected one object a line"),
    ("an array over several lines", Text("a.json", json.dumps([{"text": "x"}], indent=1).encode()),
     "a.json: line 1 begins JSON that goes on over several lines; expected one object a line"),
    ("an array of objects, one a line", Text("a.json", b'[{"text": "x"},\n{"text": "y"}]'),
     "a.json: line 1 begins JSON that goes on over several lines; expected one object a line"),
    ("an object over several lines", Text("a.jsonl", json.dumps({"text": "x"}, indent=1).encode()),
     "a.jsonl: line 1 begins JSON that goes on over several lines; expected one object a line"),
    ("no such field", Text("a.jsonl", b'{"text": "x"}\n{"body": "x"}'), "line 2: no text_key 'text'; there are: body"),
    ("a field that is no text", Text("a.jsonl", b'{"text": 3}'), "line 1: text_key 'text' holds int, not text"),
    ("half a surrogate pair", Text("a.jsonl", b'{"text": "\\ud800"}'), "the sources hold no document with text"),
    ("no Parquet", Text("a.parquet", b"no parquet"), "a.parquet: cannot be read: Parquet magic bytes not found"),
    ("Parquet cut short", Text("a.parquet", parquet({"text": ["a"] * 99})[:-20]), "a.parquet: cannot be read"),
    ("no such column", Text("a.parquet", parquet({"body": ["a"]})), "a.parquet: no text_key 'text'; there are: body"),
    ("a column of numbers", Text("a.parquet", parquet({"text": [1]})), "text_key 'text' holds int, not text"),
    ("a column without rows", Text("a.parquet", parquet({"text": NO_TEXT})), "data.sources: no text in a.parquet"),
    # Command lines.
    ("no stage", Command(""), "Error: Missing command."),
    ("an unknown stage", Command("trian x"), "Error: No such command 'trian'. Did you mean 'train'?"),
    ("a missing argument", Command("train"), "Error: Missing argument 'RUN_DIR'."),
    ("no threads", Command("prepare x --threads 0"), "Error: Invalid value for '--threads': "),
    ("threads in words", Command("prepare x --threads many"), "Error: Invalid value for '--threads': "),
    ("too many threads", Command("prepare x --threads 99999"), "Error: Invalid value for '--threads': "),
    ("an unknown option", Command("train x --untill evaluate"),
     "Error: No such option: --untill"),
    ("an unknown router", Command("moefy --router centre"), "'centre' is not one of 'center', 'random'"),
    ("no port", Command("ui --port 70000"), "Error: Invalid value for '--port': "),
    ("a config that is missing", Command("configs none.yaml"), "none.yaml: no such file"),
    ("a folder for a config", Command("configs results"), "results: not a file"),
    ("a path that is too long", Command("configs " + "x" * 5000), "cannot be read: File name too long"),
    ("results that are a file", Command(f"configs {QUICK} --results taken", a_file), "Not a directory: 'taken"),
    ("results that cannot be written", Command(f"configs {QUICK} --results /proc/x"),
     "No such file or directory: '/proc/x'"),
    ("a store in a file", Command("store taken", a_file), "File exists: 'taken'"),
    ("data that is missing", Command("prepare none"), "none/config.yaml: no such file"),
    ("a run that is missing", Command("train none"), "none/config.yaml: no such file"),
    ("a run's config of bytes", Command(f"train {RUN}", cut(b"\xff")),
     "config.yaml: damaged (its checksum does not fit)"),
    ("a run's config cut short", Command(f"train {RUN}", cut(b"experiment: a\narm")),
     "config.yaml: damaged (its checksum does not fit)"),
    ("data not yet encoded", Command(f"train {RUN}"),
     "index.json: not found; run the stage that writes it first"),
    ("an unknown end", Command(f"train {RUN} --until trian"),
     "--until trian: run dense-seed0 has no such stage; allowed: dense, evaluate"),
    ("another method's stage", Command(f"train {RUN} --until moefy"),
     "--until moefy: run dense-seed0 has no such stage; allowed: dense, evaluate"),
    ("a stage that is left out", Command(f"train {RUN} --until analyse"),
     "--until analyse: run dense-seed0 has no such stage; allowed: dense, evaluate"),
    ("a phase for an end", Command(f"train {RUN} --until 00-dense"),
     "--until 00-dense: run dense-seed0 has no such stage; allowed: dense, evaluate"),
    ("a phase out of turn", Command(f"train {RUN} --from 05-sparse"),
     "--from 05-sparse: run dense-seed0 has not reached it; allowed: none"),
    ("no phase", Command(f"train {RUN} --from ²-dense"),
     "--from ²-dense: run dense-seed0 has not reached it; allowed: none"),
    ("a measurement for a beginning", Command(f"train {RUN} --from evaluate"),
     "--from evaluate: trains nothing; `snakemake --forcerun evaluate` measures again"),
    ("a run and a phase, as once", Command(f"train {RUN} 00-dense"),
     "'00-dense': expected KEY=VALUE, such as training.steps=100"),
    ("a run before the one that it starts from", Command(f"train {POSTHOC}"),
     f"{RUN}/stages/dense.json: not found; `ssd-lit train "),
    ("an analysis that nobody asked for", Command(f"analyse {RUN}"),
     "analysis.yaml: not found; the experiment has no such measurement of this run"),
    ("a run not yet trained", Command(f"evaluate {RUN}"),
     "00-dense/phase.json: not found; `ssd-lit train /"),
    ("an experiment not yet run", Command("summarise results/quick"),
     f"00-dense/phase.json: not found; `ssd-lit train {RUN}` trains the run to its end"),
    ("no experiment to verify", Command("verify /"), "/: neither an experiment's folder nor that of one of its runs"),
    ("nothing to MoEfy", Command("moefy"), "Error: Missing option '--model'."),
    ("a model that is missing", Command("moefy --model none --experts 2 --top-k 1 --out x"), "'none': no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), [one[1:] for one in BAD], ids=[one[0] for one in BAD])
def test_bad_input_is_answered_in_a_line(given: Any, message: str, tmp_path: Path) -> None:
    status, told = given.told(tmp_path)
    assert status in (1, 2)
    assert message in told
    # Two mistakes in a config are both told; usage stands before what is wrong with a command line.
    answer = told.split(": failed: ")[-1].split("Error: ")[-1].splitlines()
    assert len(answer) <= 2
    assert all(len(line) < 6000 if "x" * 5000 in line else len(line) < 700 for line in answer)


def test_no_input_is_listed_twice() -> None:
    assert len({what for what, _, _ in BAD}) == len(BAD) >= 60


GOOD: list[tuple[str, Text]] = [
    ("UTF-16", Text("a.txt", WORDS.decode().encode("utf-16"))),
    ("Windows line ends", Text("a.txt", WORDS.replace(b"\n", b"\r\n"))),
    ("one giant document among others", Text("a.txt", WORDS + b"\n\n" + b"word " * 200_000)),
    ("2 MB on one line among others", Text("a.txt", WORDS + b"\n\n" + b"x" * 2_000_000)),
    ("a word of 100 kB in every document", Text("a.txt", b"\n\n".join(b"%d" % n * 50_000 for n in range(60)))),
    ("folders linked in rings", Text("d", rings, paths="d/**/*.txt")),
]


@pytest.mark.parametrize("given", [one[1] for one in GOOD], ids=[one[0] for one in GOOD])
def test_strange_text_is_prepared_like_any(given: Text, tmp_path: Path) -> None:
    status, told = given.told(tmp_path)
    assert status == 0, told


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, told = told_by(["ui", "--port", str(port)], tmp_path)
    assert status == 1
    assert f"port {port} is taken; give another with --port" in told


def test_a_file_that_vanishes_before_it_is_read_is_told(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    found = documents(FilesSource(kind="files", paths=[f"{tmp_path}/*.txt"]))
    assert next(found) == "a.txt"
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ConfigError, match=r"b\.txt: cannot be read: \[Errno 2\] No such file"):
        next(found)


# Anything at all. The same examples every time, so that what passed once passes again.
def examples(count: int) -> settings:
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(min_value=-3, max_value=600) | st.floats() | st.text()
    | st.dates() | st.binary(max_size=9)
    | st.sampled_from(["dense", "ssd", "bert", "t5", "llama", "kmeans", "gate", "auto", "../..", "/", "*", "a" * 99])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | SCALARS, inner, max_size=3),
)


def keys_of(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every key of a mapping and of the mappings in it."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*above, key)
        yield from keys_of(value, (*above, key))


def answered(status: int, told: str) -> None:
    """Either work or an answer; an exception would have ended the test."""
    assert status in (0, 1)
    assert status == 0 or 0 < len(told.split(": failed: ")[-1].splitlines()) <= 2, told


@examples(80)
@given(ways=st.lists(st.sampled_from(sorted(keys_of(quick()), key=str)), min_size=1, max_size=3), data=st.data())
def test_a_config_with_anything_anywhere_works_or_is_answered(
    ways: list[tuple[Any, ...]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = quick()
    for *above, key in ways:
        place: Any = content
        for step in above:
            with contextlib.suppress(KeyError, IndexError, TypeError):
                place = place[step]
        if not isinstance(place, dict):
            continue
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                place[key] = data.draw(VALUES)
            case "remove":
                place.pop(key, None)
            case _:
                place[data.draw(st.text(max_size=5))] = data.draw(VALUES)
    answered(*File(yaml.safe_dump(content)).told(tmp_path_factory.mktemp("config")))


@examples(100)
@given(st.text(alphabet="ab:-[]{}&*!?|>%@`#,'\"\\ \n\t0.~<=é\ufeff", max_size=40) | st.binary(max_size=40))
def test_a_config_of_any_characters_is_answered(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    status, told = File(content).told(tmp_path_factory.mktemp("config"))
    assert status == 1
    answered(status, told)


@examples(60)
@given(
    content=st.binary(max_size=300) | st.text(max_size=300).map(str.encode),
    name=st.sampled_from(
        ["a.txt", "a.json", "a.parquet", "a.txt.gz", "a.jsonl.xz", "a.txt.zst", "a.txt.bz2", "a.parquet.gz"]
    ),
)
def test_a_text_of_any_bytes_works_or_is_answered(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    answered(*Text(name, content).told(tmp_path_factory.mktemp("text")))


@examples(60)
@given(
    suffix=st.sampled_from([".gz", ".xz", ".zst", ".parquet"]),
    place=st.integers(min_value=0, max_value=9999),
    damage=st.sampled_from([flipped, lambda content, place: content[:place]]),
)
def test_a_damaged_archive_works_or_is_answered(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, place: int, damage: Callable[[bytes, int], bytes]
) -> None:
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    content = parquet({"text": WORDS.decode().split("\n\n")}) if suffix == ".parquet" else pack[suffix](WORDS)
    name = "a.parquet" if suffix == ".parquet" else f"a.txt{suffix}"
    text = Text(name, damage(content, place % len(content)))
    answered(*text.told(tmp_path_factory.mktemp("text")))


@examples(15)
@given(texts=st.lists(st.text(max_size=60), max_size=20), crlf=st.booleans())
def test_tokens_hold_every_text_once_whatever_it_is(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], crlf: bool
) -> None:
    """With enough ordinary documents beside them for every split to have some."""
    folder = tmp_path_factory.mktemp("text")
    texts = [*texts, *WORDS.decode().split("\n\n")]
    lines = [json.dumps({"text": text}) for text in texts]
    given = Text("a.jsonl", ("\r\n" if crlf else "\n").join(lines).encode())
    status, told = given.told(folder)
    assert status == 0, told
    data = next((folder / "results/data").iterdir())
    tokenizer, index = load_tokenizer(data / "tokenizer"), load_index(data / "tokens")
    found = []
    for split in index["splits"]:
        ids = np.fromfile(data / "tokens" / f"{split}.bin", dtype=index["dtype"])
        ends = np.flatnonzero(ids == index["eos_id"])
        found += [tokenizer.decode(one[one != index["eos_id"]].tolist()) for one in np.split(ids, ends + 1)[:-1]]
    assert sorted(found) == sorted({normalise(text) for text in texts} - {""})
