"""The subcommands that show runs: plot, report."""

import argparse

from pretrain_lib.commands.outputs import check_out
from pretrain_lib.report.pictures import check_panels, plot_runs
from pretrain_lib.report.report import check_page, write_report


def run_plot(options: argparse.Namespace) -> None:
    """Plot the metrics of runs."""
    panels = [name.strip() for name in options.panels.split(",")]
    check_panels(panels)
    check_out(options.out)
    for path in plot_runs(options.runs, options.out, x=options.x, panels=panels):
        print(path)


def run_report(options: argparse.Namespace) -> None:
    """Write the report of runs."""
    check_page(options.runs, options.out)
    check_out(options.out)
    for path in write_report(options.runs, options.out, watts=options.watts):
        print(path)
