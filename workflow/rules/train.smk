# The phases of a run. How many there are and when each ends, the run decides: phase.json names the next one.
# It is the last file that a phase writes, and stands first among the outputs: Snakemake asks for the first one to learn
# whether a checkpoint is done.


rule store:
    output:
        touch(RESULTS / ".mlflow-ready"),
    log:
        RESULTS / "logs/store.log",
    benchmark:
        RESULTS / "logs/store.tsv"
    shell:
        "ssd-lit store {RESULTS} 2>&1 | keep {log}"


checkpoint train:
    input:
        config=HERE / "runs/{run}/config.yaml",
        tokens=rules.encode.output.index,
        store=ancient(rules.store.output),
        before=phase_before,
    output:
        record=HERE / "runs/{run}/phases/{index}-{mode}/phase.json",
        weights=HERE / "runs/{run}/phases/{index}-{mode}/last.ckpt",
    log:
        HERE / "runs/{run}/logs/{index}-{mode}.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/{index}-{mode}.tsv"
    threads: lambda wildcards: THREADS[wildcards.run]
    priority: lambda wildcards: PRIORITY[wildcards.run]
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
    shell:
        "ssd-lit train {params.run} {wildcards.index}-{wildcards.mode} 2>&1 | keep -a {log}"


checkpoint moefy:
    input:
        config=HERE / "runs/{run}/config.yaml",
        tokens=rules.encode.output.index,
        store=ancient(rules.store.output),
        before=phase_before,
    output:
        record=HERE / "runs/{run}/phases/{index}-moefy/phase.json",
        weights=HERE / "runs/{run}/phases/{index}-moefy/last.ckpt",
    log:
        HERE / "runs/{run}/logs/{index}-moefy.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/{index}-moefy.tsv"
    threads: lambda wildcards: THREADS[wildcards.run]
    priority: lambda wildcards: PRIORITY[wildcards.run]
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
    shell:
        "ssd-lit moefy {params.run} {wildcards.index}-moefy 2>&1 | keep -a {log}"


checkpoint route:
    input:
        config=HERE / "runs/{run}/config.yaml",
        tokens=rules.encode.output.index,
        store=ancient(rules.store.output),
        before=phase_before,
    output:
        record=HERE / "runs/{run}/phases/{index}-router/phase.json",
        weights=HERE / "runs/{run}/phases/{index}-router/last.ckpt",
    log:
        HERE / "runs/{run}/logs/{index}-router.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/{index}-router.tsv"
    threads: lambda wildcards: THREADS[wildcards.run]
    priority: lambda wildcards: PRIORITY[wildcards.run]
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
    shell:
        "ssd-lit route {params.run} {wildcards.index}-router 2>&1 | keep -a {log}"
