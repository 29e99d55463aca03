"""Plots of runs.

`pictures` lays out and saves a figure, `curves` draws its lines and marks, `baselines` selects
published scores for comparison.
"""
