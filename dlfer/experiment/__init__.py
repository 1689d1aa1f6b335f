"""Execution of an experiment from data to report, and evaluation of trained models on other data.

The input is an `ExperimentConfig`, the output a run directory with the model, predictions, metrics and report.
`run` is the only module that is concerned with every step.
"""
