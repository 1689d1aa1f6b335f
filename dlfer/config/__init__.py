"""Experiment files: what keys there are, how they are read, checked and overridden.

What enters is a YAML file, with overrides in dotted keys. What leaves is an `ExperimentConfig`, or one error that names
every problem of the file. Nothing else in dlfer reads YAML.
"""
