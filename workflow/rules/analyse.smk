# What a run's snapshots and experts tell, where the experiment asks for it.


rule analyse:
    input:
        settings=HERE / "runs/{run}/analysis.yaml",
        weights=final_phase,
        # Not read: the stages of a run go one after another, and the evaluation is sooner done.
        evaluation=ancient(HERE / "runs/{run}/evaluation.json"),
    output:
        HERE / "runs/{run}/analysis/analysis.json",
    log:
        HERE / "runs/{run}/logs/analyse.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/analyse.tsv"
    threads: lambda wildcards: THREADS[wildcards.run]
    priority: lambda wildcards: PRIORITY[wildcards.run]
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
    shell:
        "ssd-lit analyse {params.run} 2>&1 | keep {log}"
