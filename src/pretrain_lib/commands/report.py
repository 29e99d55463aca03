"""The subcommands that show runs: plot, report."""

import argparse

from pretrain_lib.files.outputs import check_file
from pretrain_lib.report.pictures import check_panels, plot_runs
from pretrain_lib.report.report import check_page, write_report


def run_plot(options: argparse.Namespace) -> None:
    """Plot the metrics of runs."""
    check_panels(options.panels)
    if options.out is not None or options.runs[0].is_dir():
        check_file(options.out or options.runs[0] / "plots" / "curves.png", named="--out ")
    for path in plot_runs(options.runs, options.out, x=options.x, panels=options.panels):
        print(path)


def run_report(options: argparse.Namespace) -> None:
    """Write the report of runs."""
    page = check_page(options.runs, options.out)
    if options.out is not None or options.runs[0].is_dir():
        check_file(page, named="--out ")
    for path in write_report(options.runs, options.out, watts=options.watts):
        print(path)
