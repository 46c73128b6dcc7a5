# What a run's final model is worth on other tasks, where the experiment asks for it.


rule downstream:
    input:
        settings=HERE / "runs/{run}/downstream.yaml",
        weights=final_phase,
        # Not read: the stages of a run go one after another, and the evaluation is sooner done.
        evaluation=ancient(HERE / "runs/{run}/evaluation.json"),
    output:
        HERE / "runs/{run}/downstream/downstream.json",
    log:
        HERE / "runs/{run}/logs/downstream.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/downstream.tsv"
    threads: lambda wildcards: THREADS[wildcards.run]
    priority: lambda wildcards: PRIORITY[wildcards.run]
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
    shell:
        "ssd-lit downstream {params.run} 2>&1 | keep {log}"
