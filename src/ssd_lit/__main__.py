"""`python -m ssd_lit STAGE ...` is `ssd-lit STAGE ...`."""

from ssd_lit.cli import run

run()
