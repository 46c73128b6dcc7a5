# `--config jobs=runs`: one job takes a run from warm-up to its last measurement. A warm-up that runs share is a job of
# its own; runs whose models are tried on other tasks leave one result more.

STALE = ["evaluate", *(["analyse"] if EXPERIMENT.analysis is not None else [])]


def whole(tried):
    """The runs of one kind, as a wildcard constraint."""
    names = {path.parts[-3] for path in PLAN.of_all_runs("downstream")}
    return "|".join(name for name in PLAN.configs if (name in names) == tried) or "none"


rule run:
    input:
        tokens=rules.encode.output.index,
        store=ancient(rules.store.output),
        before=lambda wildcards: PLAN.before_run(wildcards.run),
        stale=lambda wildcards: PLAN.stale(wildcards.run, *STALE),
    output:
        [HERE / "runs/{run}" / result for result in ("evaluation.json", "analysis/analysis.json")[: len(STALE)]],
    log:
        HERE / "runs/{run}/logs/run.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/run.tsv"
    wildcard_constraints:
        run=whole(tried=False),
    priority: lambda wildcards: PRIORITY[wildcards.run]
    threads: lambda wildcards: THREADS[wildcards.run]
    resources:
        **asked("run"),
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
        launcher=lambda _, resources: launcher(resources),
    shell:
        "{params.launcher}ssd-lit train {params.run:q} 2>&1 | keep {log:q}"


use rule run as run_and_try with:
    input:
        tokens=rules.encode.output.index,
        store=ancient(rules.store.output),
        before=lambda wildcards: PLAN.before_run(wildcards.run),
        stale=lambda wildcards: PLAN.stale(wildcards.run, *STALE, "downstream"),
    output:
        [HERE / "runs/{run}" / result for result in ("evaluation.json", "analysis/analysis.json")[: len(STALE)]],
        HERE / "runs/{run}/downstream/downstream.json",
    wildcard_constraints:
        run=whole(tried=True),
