"""Metrics with their uncertainty, computed from predictions alone.

The inputs are `Predictions` and arrays, the outputs are the contents of metrics.json: values, 95 % intervals, tests and
calibration. TensorFlow is not imported, so the metrics of any finished run can be recomputed without it.
"""
