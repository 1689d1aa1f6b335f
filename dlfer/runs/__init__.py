"""Run directories and everything that reads or writes their files.

What enters is an experiment that begins, or the name of a run or a model. What leaves is a `Run`, its records, and the
means to write a file whole or not at all. Nothing here knows what the numbers in the records mean.
"""
