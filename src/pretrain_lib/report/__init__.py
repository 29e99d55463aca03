"""Plots of runs: `curves` reads what is drawn, `pictures` draws it, `baselines` adds references."""
