"""One experiment from data to report, and the evaluation of a finished one on other data.

What enters is an `ExperimentConfig`. What leaves is a run directory with the model, predictions, metrics and report.
`run` is the only module that sees every step.
"""
