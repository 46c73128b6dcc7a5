# What the final model of a run can do; analyses and other tasks where the experiment asks for them.


rule evaluate:
    input:
        model=lambda wildcards: PLAN.final(wildcards.run),
        stale=lambda wildcards: PLAN.stale(wildcards.run, "evaluate"),
    output:
        HERE / "runs/{run}/evaluation.json",
    log:
        HERE / "runs/{run}/logs/evaluate.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/evaluate.tsv"
    priority: lambda wildcards: PRIORITY[wildcards.run]
    threads: lambda wildcards: THREADS[wildcards.run]
    resources:
        **asked("evaluate"),
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
        measurement="evaluate",
    shell:
        "ssd-lit {params.measurement} {params.run:q} 2>&1 | keep {log:q}"


use rule evaluate as analyse with:
    input:
        model=lambda wildcards: PLAN.final(wildcards.run),
        stale=lambda wildcards: PLAN.stale(wildcards.run, "analyse"),
        # Not read: the stages of a run go one after another, and the evaluation is sooner done.
        evaluation=ancient(HERE / "runs/{run}/evaluation.json"),
    output:
        HERE / "runs/{run}/analysis/analysis.json",
    log:
        HERE / "runs/{run}/logs/analyse.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/analyse.tsv"
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
        measurement="analyse",


use rule evaluate as downstream with:
    input:
        model=lambda wildcards: PLAN.final(wildcards.run),
        stale=lambda wildcards: PLAN.stale(wildcards.run, "downstream"),
        # Not read: the stages of a run go one after another, and the evaluation is sooner done.
        evaluation=ancient(HERE / "runs/{run}/evaluation.json"),
    output:
        HERE / "runs/{run}/downstream/downstream.json",
    log:
        HERE / "runs/{run}/logs/downstream.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/downstream.tsv"
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
        measurement="downstream",
