"""Studies of several runs: ablations, sweeps, cross-validations, searches, and the comparison of finished runs.

The input is an experiment file with keys to vary. The output is a directory with a row for each member and a comparison
over seeds. A member is an ordinary experiment with overrides.
"""
