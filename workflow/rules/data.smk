# Text to tokens, once for all runs.


rule prepare:
    input:
        stale=lambda wildcards: PLAN.stale_documents(),
    output:
        directory(DATA / "documents"),
    log:
        DATA / "logs/prepare.log",
    benchmark:
        DATA / "benchmarks/prepare.tsv"
    threads: lambda _: DATA_CORES if on_cluster() else workflow.cores
    params:
        data=DATA,
    shell:
        "ssd-lit prepare {params.data:q} --threads {threads} 2>&1 | keep {log:q}"


rule tokenizer:
    input:
        rules.prepare.output,
        stale=lambda wildcards: PLAN.stale_tokenizer(),
    output:
        directory(DATA / "tokenizer"),
    log:
        DATA / "logs/tokenizer.log",
    benchmark:
        DATA / "benchmarks/tokenizer.tsv"
    threads: lambda _: DATA_CORES if on_cluster() else workflow.cores
    params:
        data=DATA,
    shell:
        "ssd-lit tokenizer {params.data:q} --threads {threads} 2>&1 | keep {log:q}"


rule encode:
    input:
        rules.prepare.output,
        rules.tokenizer.output,
    output:
        index=DATA / "tokens/index.json",
        tokens=expand(DATA / "tokens/{split}.bin", split=["train", "validation", "test", *EXPERIMENT.data.held_out]),
    log:
        DATA / "logs/encode.log",
    benchmark:
        DATA / "benchmarks/encode.tsv"
    threads: lambda _: DATA_CORES if on_cluster() else workflow.cores
    params:
        data=DATA,
    shell:
        "ssd-lit encode {params.data:q} --threads {threads} 2>&1 | keep {log:q}"
