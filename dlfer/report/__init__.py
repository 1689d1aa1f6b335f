"""Reports of runs: HTML pages, figures, model cards and terminal tables.

The input is a run directory; the output is a self-contained HTML page, a model card or text for a terminal. All values
come from the run's records. Neither TensorFlow nor a network connection is needed.
"""
