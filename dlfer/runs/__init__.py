"""Run directories, and the code that creates them and reads and writes their files.

The package takes an experiment to start, or the name of a run or a model, and returns a `Run`, its records, and helpers
for atomic writes. It does not interpret the numbers in the records.
"""
