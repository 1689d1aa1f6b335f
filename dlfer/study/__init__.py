"""Many experiments: ablations, sweeps, searches, and the comparison of finished runs.

What enters is an experiment file with keys to vary. What leaves is a directory with one line per member and a verdict
over seeds. A member is an ordinary experiment with overrides.
"""
