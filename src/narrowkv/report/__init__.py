"""Plots and pages drawn from files of results."""
