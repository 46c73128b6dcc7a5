# The training of a run, stage by stage. What a stage leaves last is a small record; weights and phases lie beside it,
# where Snakemake does not remove them. A stage whose result stands writes its record again and ends.


rule store:
    output:
        touch(RESULTS / ".mlflow-ready"),
    log:
        RESULTS / "logs/store.log",
    benchmark:
        RESULTS / "logs/store.tsv"
    localrule: True
    params:
        results=RESULTS,
    shell:
        "ssd-lit store {params.results:q} 2>&1 | keep {log:q}"


# The first dense phase, once for all runs that share it.
rule warmup:
    input:
        tokens=rules.encode.output.index,
        store=ancient(rules.store.output),
        stale=lambda wildcards: PLAN.stale(wildcards.run, "warmup"),
    output:
        HERE / "runs/{run}/stages/warmup.json",
    log:
        HERE / "runs/{run}/logs/warmup.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/warmup.tsv"
    priority: lambda wildcards: PRIORITY[wildcards.run]
    threads: lambda wildcards: THREADS[wildcards.run]
    resources:
        **asked("warmup"),
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
        launcher=lambda _, resources: launcher(resources),
        stage="warmup",
        anew=anew("warmup"),
    shell:
        "{params.launcher}ssd-lit train {params.run:q} --until {params.stage} {params.anew} 2>&1 | keep {log:q}"


# The first MoEfication: of a warm-up, of fresh weights, of another run's final model.
use rule warmup as moefy with:
    input:
        tokens=rules.encode.output.index,
        store=ancient(rules.store.output),
        before=lambda wildcards: PLAN.before(wildcards.run, "moefy"),
        stale=lambda wildcards: PLAN.stale(wildcards.run, "moefy"),
    output:
        HERE / "runs/{run}/stages/moefy.json",
    log:
        HERE / "runs/{run}/logs/moefy.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/moefy.tsv"
    resources:
        **asked("moefy"),
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
        launcher=lambda _, resources: launcher(resources),
        stage="moefy",
        anew=anew("moefy"),


# All phases behind it, to the final model.
use rule warmup as sparse_phases with:
    input:
        tokens=rules.encode.output.index,
        store=ancient(rules.store.output),
        before=lambda wildcards: PLAN.before(wildcards.run, "sparse_phases"),
        stale=lambda wildcards: PLAN.stale(wildcards.run, "sparse_phases"),
    output:
        HERE / "runs/{run}/stages/sparse_phases.json",
    log:
        HERE / "runs/{run}/logs/sparse_phases.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/sparse_phases.tsv"
    resources:
        **asked("sparse_phases"),
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
        launcher=lambda _, resources: launcher(resources),
        stage="sparse_phases",
        anew=anew("sparse_phases"),


# The whole training of a dense run.
use rule warmup as dense with:
    input:
        tokens=rules.encode.output.index,
        store=ancient(rules.store.output),
        before=lambda wildcards: PLAN.before(wildcards.run, "dense"),
        stale=lambda wildcards: PLAN.stale(wildcards.run, "dense"),
    output:
        HERE / "runs/{run}/stages/dense.json",
    log:
        HERE / "runs/{run}/logs/dense.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/dense.tsv"
    resources:
        **asked("dense"),
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
        launcher=lambda _, resources: launcher(resources),
        stage="dense",
        anew=anew("dense"),


# Routers trained behind the final model.
use rule warmup as route with:
    input:
        tokens=rules.encode.output.index,
        store=ancient(rules.store.output),
        before=lambda wildcards: PLAN.before(wildcards.run, "route"),
        stale=lambda wildcards: PLAN.stale(wildcards.run, "route"),
    output:
        HERE / "runs/{run}/stages/route.json",
    log:
        HERE / "runs/{run}/logs/route.log",
    benchmark:
        HERE / "runs/{run}/benchmarks/route.tsv"
    resources:
        **asked("route"),
    params:
        run=lambda wildcards: HERE / "runs" / wildcards.run,
        launcher=lambda _, resources: launcher(resources),
        stage="route",
        anew=anew("route"),
