"""Pages, figures and tables for people, made from the records of runs.

What enters is a run directory. What leaves is a self-contained HTML page, a model card or text for a terminal. Nothing is
computed here that a record does not hold, and neither TensorFlow nor a network connection is needed.
"""
