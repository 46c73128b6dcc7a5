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
    shell:
        "ssd-lit summarise {HERE:q} 2>&1 | keep {log:q}"


rule figures:
    input:
        PLAN.of_all_runs("evaluate"),
        PLAN.of_all_runs("analyse"),
        PLAN.of_all_runs("downstream"),
        stale=lambda _: PLAN.stale_tables(),
    output:
        [
            report(HERE / f"figures/{name}.svg", caption=f"../report/{caption_name(name)}.rst", category="Figures")
            for name in FIGURES
        ],
        expand(HERE / "figures/{name}.{kind}", name=FIGURES, kind=["png", "csv"]),
    log:
        HERE / "logs/figures.log",
    benchmark:
        HERE / "benchmarks/figures.tsv"
    shell:
        "ssd-lit figures {HERE:q} 2>&1 | keep {log:q}"


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
    shell:
        "ssd-lit report {HERE:q} 2>&1 | keep {log:q}"
