"""Experiment files: their schema, and how they are read, overridden and validated.

The input is a YAML file, with overrides as dotted keys. The output is an `ExperimentConfig`, or one error that lists
every problem of the file. No other part of dlfer reads YAML.
"""
