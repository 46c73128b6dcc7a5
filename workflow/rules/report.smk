# Tables, figures, report.


rule summarise:
    input:
        HERE / "experiment.yaml",
        expand(HERE / "runs/{run}/evaluation.json", run=RUNS),
        DOWNSTREAM,
    output:
        report(SUMMARY, caption="../report/summary.rst", category="Tables"),
        ARMS_TABLE,
        DOWNSTREAM_TABLE,
    log:
        HERE / "logs/summarise.log",
    benchmark:
        HERE / "benchmarks/summarise.tsv"
    shell:
        "ssd-lit summarise {HERE} 2>&1 | keep {log}"


rule figures:
    input:
        HERE / "experiment.yaml",
        expand(HERE / "runs/{run}/evaluation.json", run=RUNS),
        ANALYSES,
        DOWNSTREAM,
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
        "ssd-lit figures {HERE} 2>&1 | keep {log}"


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
        "ssd-lit report {HERE} 2>&1 | keep {log}"
