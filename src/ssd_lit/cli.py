"""`ssd-lit COMMAND ...`: what the workflow calls, and a person can call too.

Every command imports what it needs: the settings take a quarter of a second, other libraries seconds.
"""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from ssd_lit.command import Threads, app, main, run, shown, stage
from ssd_lit.moe.names import Construction, Mode, UntrainedRouter
from ssd_lit.stages import ALL_STAGES

__all__ = ["app", "main", "run"]

Experiment = Annotated[str, Argument(metavar="EXPERIMENT", help="a YAML file, or a name that `ssd-lit list` shows")]
DataDir = Annotated[Path, Argument(metavar="DATA_DIR", help="a folder under results/data, which holds config.yaml")]
RunDir = Annotated[Path, Argument(metavar="RUN_DIR", help="results/EXPERIMENT/runs/RUN, which holds config.yaml")]
ExpDir = Annotated[Path, Argument(metavar="EXP_DIR", help="results/EXPERIMENT, which holds experiment.yaml")]
Place = Annotated[Path, Argument(metavar="PLACE", help="results/EXPERIMENT, or results/EXPERIMENT/runs/RUN")]
Results = Annotated[Path, Option(help="the results folder")]
Settings = Annotated[
    list[str] | None, Argument(metavar="KEY=VALUE", help="settings to change, such as training.steps=100")
]
Threshold = Annotated[
    float | None,
    Option(min=0, max=1, metavar="S", help="dynamic k: experts with at least this share of a token's best score"),
]
MOST = 10**9


@shown
def init(
    folder: Annotated[Path, Argument(metavar="DIR", help="the new folder")],
    text: Annotated[
        list[Path] | None, Option(metavar="PATH", help="a file or folder of text; may be repeated (DIR/text)")
    ] = None,
    size: Annotated[
        Literal["cpu", "gpu"] | None, Option(help="of the model: for a CPU or for a GPU (what this machine has)")
    ] = None,
) -> None:
    """Make a project of your own: a commented experiment, a Snakefile, a Makefile, profiles."""
    from ssd_lit.pipeline import project

    print(project.init(folder, text or [], size), end="")


@shown
def list_() -> None:
    """Show the experiments that there are, here and as shipped."""
    from ssd_lit.pipeline import project

    project.show_experiments()


@shown
def plan(
    experiment: Experiment,
    settings: Settings = None,
    *,
    results: Results = Path("results"),
    steps: Annotated[
        int, Option(min=0, max=1000, help="steps of each kind that are timed on this machine; 0: none")
    ] = 3,
) -> None:
    """Say what an experiment will take before anything runs: runs, tokens, FLOPs, parameters, memory, hours."""
    from ssd_lit.pipeline import estimate

    estimate.plan(experiment, results, settings or [], steps)


@stage
def configs(experiment: Experiment, settings: Settings = None, *, results: Results = Path("results")) -> str:
    """Check an experiment and write the resolved config of its data and runs.

    Settings are laid over the experiment: training.steps=100 arms.ssd.switching.tau=0.9. Values are YAML; null drops
    an arm.
    """
    from ssd_lit.pipeline import data

    return data.configs(experiment, results, settings or [])


@stage
def prepare(data_dir: DataDir) -> str:
    """Read, clean, deduplicate and split the text."""
    from ssd_lit.pipeline import data

    return data.prepare(data_dir)


@stage
def tokenizer(data_dir: DataDir) -> str:
    """Train the tokenizer on the training documents."""
    from ssd_lit.pipeline import data

    return data.tokenizer(data_dir)


@stage
def encode(data_dir: DataDir, threads: Threads = None) -> str:
    """Encode all documents into blocks of tokens."""
    from ssd_lit.pipeline import data

    return data.encode(data_dir, threads)


@stage
def train(
    run_dir: RunDir,
    settings: Settings = None,
    *,
    until: Annotated[
        str | None, Option(metavar="STAGE", help=f"only to the end of this stage ({', '.join(ALL_STAGES)})")
    ] = None,
    start: Annotated[
        str | None,
        Option("--from", metavar="STAGE", help="do this stage, or a phase such as 05-sparse, and all behind it anew"),
    ] = None,
    threads: Threads = None,
) -> str:
    """Take a run from where it stands to its end, measurements included; goes on where it was interrupted.

    Settings such as training.steps=100 are written into the run's config.yaml, and what was made from other settings is
    made anew. They stay until `ssd-lit configs` or snakemake writes the experiment's again.
    """
    from ssd_lit.pipeline import train as training

    return training.train(run_dir, settings=settings or [], until=until, start=start, threads=threads)


@shown
def status(
    exp_dir: Annotated[Path | None, Argument(metavar="EXP_DIR", help="results/EXPERIMENT (all of them)")] = None,
    *,
    watch: Annotated[bool, Option("--watch", help="go on until all runs are done")] = False,
    results: Results = Path("results"),
) -> None:
    """Show where every run stands: its state, phase, step, loss, time left, and why it stopped."""
    from ssd_lit.pipeline import status as board

    board.status(exp_dir, results, watch=watch)


@stage
def evaluate(run_dir: RunDir, threads: Threads = None) -> str:
    """Measure the final model of a run into evaluation.json."""
    from ssd_lit.pipeline import train as training

    return training.measure_run(run_dir, "evaluate", threads=threads)


@stage
def analyse(run_dir: RunDir, threads: Threads = None) -> str:
    """Compare a run's snapshots and watch its experts, into analysis/."""
    from ssd_lit.pipeline import train as training

    return training.measure_run(run_dir, "analyse", threads=threads)


@stage
def downstream(run_dir: RunDir, threads: Threads = None) -> str:
    """Fine-tune on GLUE, score BLiMP: a run's final model on other tasks."""
    from ssd_lit.pipeline import train as training

    return training.measure_run(run_dir, "downstream", threads=threads)


@stage
def moefy(
    model: Annotated[Path, Option(metavar="DIR", help="a checkpoint of a supported family in safetensors")],
    experts: Annotated[int, Option(min=1, max=MOST, metavar="E", help="experts of one FFN; must divide its neurons")],
    top_k: Annotated[int, Option(min=1, max=MOST, metavar="K", help="experts a token, unless told otherwise")],
    out: Annotated[Path, Option(metavar="DIR", help="the new folder")],
    construction: Annotated[Construction, Option(help="how neurons are grouped")] = "kmeans",
    router: Annotated[UntrainedRouter, Option(help="what chooses experts")] = "center",
    seed: Annotated[int, Option(metavar="N", help="of construction and router")] = 0,
    text: Annotated[
        Path | None,
        Option(metavar="FILE", help="what kmeans_activations, coactivation and trained routers look at"),
    ] = None,
    calibration_tokens: Annotated[int, Option(min=1, max=MOST, metavar="T", help="tokens of it that are read")] = 8192,
    threshold: Threshold = None,
    threads: Threads = None,
) -> str:
    """Group the neurons of a checkpoint folder's model into experts (MoEfication)."""
    from ssd_lit.pipeline import exchange

    return exchange.moefy(
        model=model,
        experts=experts,
        top_k=top_k,
        out=out,
        construction=construction,
        router=router,
        seed=seed,
        text=text,
        calibration_tokens=calibration_tokens,
        threshold=threshold,
        threads=threads,
    )


@stage
def summarise(exp_dir: ExpDir) -> str:
    """Write summary.csv, one row a run."""
    from ssd_lit.pipeline import publish

    return publish.summarise(exp_dir)


@stage
def figures(exp_dir: ExpDir) -> str:
    """Draw the figures of an experiment."""
    from ssd_lit.pipeline import publish

    return publish.figures(exp_dir)


@stage
def report(exp_dir: ExpDir) -> str:
    """Write report.html; keep it and the figures in MLflow."""
    from ssd_lit.pipeline import publish

    return publish.report(exp_dir)


@stage
def verify(folder: Place) -> str:
    """Say whether results still match their inputs; exit status 1 if something does not."""
    from ssd_lit.pipeline import publish

    return publish.verify(folder)


@stage
def store(results: Annotated[Path, Argument(metavar="RESULTS", help="the results folder")]) -> str:
    """Make the MLflow store, once, before jobs share it; of one that was moved, find the artifacts again."""
    from ssd_lit.pipeline import publish

    return publish.store(results)


@stage
def send(place: Place) -> str:
    """Send MLflow the points that it has not got, and the report."""
    from ssd_lit.pipeline import publish

    return publish.send(place)


@stage
def export(
    run_dir: RunDir,
    out: Annotated[Path, Option(metavar="DIR", help="the new folder")],
    threshold: Threshold = None,
) -> str:
    """Write a run's final model as a Hugging Face checkpoint folder."""
    from ssd_lit.pipeline import exchange

    return exchange.export(run_dir, out, threshold)


@stage
def generate(
    model: Annotated[Path, Option(metavar="DIR", help="a folder that moefy or export wrote, with a tokenizer")],
    prompt: Annotated[str, Option(metavar="TEXT", help="what the text begins with")],
    mode: Annotated[Mode, Option(help="how FFNs are computed")] = "dense",
    top_k: Annotated[
        int | None, Option(min=1, max=MOST, metavar="K", help="experts a token, else what the folder says")
    ] = None,
    threshold: Threshold = None,
    new_tokens: Annotated[int, Option(min=1, max=MOST, metavar="N", help="tokens to add at most")] = 100,
    temperature: Annotated[float, Option(min=0, help="0 takes the likeliest token; above, tokens are drawn")] = 0.0,
    top_p: Annotated[float, Option(help="draw from the likeliest tokens that have this probability together")] = 1.0,
    seed: Annotated[int, Option(metavar="N", help="of the draws")] = 0,
    threads: Threads = None,
) -> str:
    """Continue a text with a folder's model, in either mode, and print it as it comes."""
    from ssd_lit.pipeline import exchange

    return exchange.generate(
        model=model,
        prompt=prompt,
        mode=mode,
        top_k=top_k,
        threshold=threshold,
        new_tokens=new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        threads=threads,
    )


@stage
def ui(
    port: Annotated[int, Option(min=1, max=65535, help="the port")] = 5000,
    results: Results = Path("results"),
) -> str:
    """Serve the MLflow UI on 127.0.0.1."""
    from ssd_lit.pipeline import publish

    return publish.ui(results, port)


@stage
def schema(
    out: Annotated[Path, Option(metavar="FILE", help="the JSON schema")] = Path("configs/schema.json"),
    page: Annotated[Path, Option(metavar="FILE", help="the reference page")] = Path("docs/settings.md"),
) -> str:
    """Write the JSON schema of an experiment's YAML, and the reference page of all settings."""
    from ssd_lit.pipeline import data

    return data.schema(out, page)
