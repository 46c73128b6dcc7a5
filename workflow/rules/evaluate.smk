# What the final model of a run can do.


rule evaluate:
    input:
        settings=HERE / "runs/{run}/evaluation.yaml",
        weights=final_phase,
    output:
        HERE / "runs/{run}/evaluation.json",
    log:
        HERE / "runs/{run}/logs/evaluate.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/evaluate.tsv"
    threads: lambda wildcards: THREADS[wildcards.run]
    priority: lambda wildcards: PRIORITY[wildcards.run]
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
    shell:
        "ssd-lit evaluate {params.run} 2>&1 | keep {log}"
