# Tables, figures, report.


rule summarise:
    input:
        PLAN.of_all_runs("evaluate"),
        PLAN.of_all_runs("downstream"),
        stale=lambda _: PLAN.stale_tables(),
    output:
        report(SUMMARY, caption="../report/summary.rst", category="Tables"),
        ARMS_TABLE,
        DOWNSTREAM_TABLE,
    log:
        HERE / "logs/summarise.log",
    benchmark:
        HERE / "benchmarks/summarise.tsv"
    localrule: True
    params:
        experiment=HERE,
    shell:
        "ssd-lit summarise {params.experiment:q} 2>&1 | keep {log:q}"


rule figures:
    input:
        PLAN.of_all_runs("evaluate"),
        PLAN.of_all_runs("analyse"),
        PLAN.of_all_runs("downstream"),
        stale=lambda _: PLAN.stale_tables(),
    output:
        # One folder: of single files Snakemake would not tell the caption which of them it stands under.
        report(
            directory(HERE / "figures"),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
    log:
        HERE / "logs/figures.log",
    benchmark:
        HERE / "benchmarks/figures.tsv"
    localrule: True
    params:
        captions=CAPTIONS,
        experiment=HERE,
    shell:
        "ssd-lit figures {params.experiment:q} 2>&1 | keep {log:q}"


rule write_report:
    input:
        SUMMARY,
        rules.figures.output,
    output:
        report(REPORT, caption="../report/report.rst", category="Report"),
    log:
        HERE / "logs/report.log",
    benchmark:
        HERE / "benchmarks/report.tsv"
    localrule: True
    params:
        experiment=HERE,
    shell:
        "ssd-lit report {params.experiment:q} 2>&1 | keep {log:q}"
