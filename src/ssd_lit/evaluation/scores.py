"""The scores of a run as tables for its model card."""

from ssd_lit.evaluation.downstream import means
from ssd_lit.evaluation.metrics import perplexity
from ssd_lit.run import Run
from ssd_lit.stages import MEASUREMENTS
from ssd_lit.support.files import read_json_checked


def score_tables(run: Run) -> str:
    """Evaluation and downstream scores in Markdown, of what was measured with the final weights; else nothing."""
    parts = [_evaluation(run)] if _is_measured(run, "evaluate") else []
    if _is_measured(run, "downstream"):
        scores = means(read_json_checked(run.folder / MEASUREMENTS["downstream"][1]))
        rows = [f"| {name.removeprefix('downstream/')} | {value:.4f} |" for name, value in scores.items()]
        parts.append("\n".join(["| other task, metric and mode | score |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _is_measured(run: Run, measurement: str) -> bool:
    settings = run.folder / MEASUREMENTS[measurement][0]
    return settings.exists() and run.is_done(measurement)


def _evaluation(run: Run) -> str:
    content = read_json_checked(run.folder / MEASUREMENTS["evaluate"][1])
    rows = []
    if content["loss_dense"] is not None:
        rows.append(("dense", content["loss_dense"]))
    rows += [(f"sparse, {point['top_k']} experts a token", point["loss"]) for point in content["curve"]]
    lines = [f"| {mode} | {loss:.4f} | {perplexity(loss):.2f} |" for mode, loss in rows]
    intro = f"On {content['tokens']:,} tokens of the {content['split']} split, in nats a target."
    return "\n".join([intro, "", "| mode | loss | perplexity |", "|---|---|---|", *lines])
