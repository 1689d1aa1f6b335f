"""Metrics with their uncertainty, computed from predictions alone.

What enters are `Predictions` and arrays. What leaves are the contents of metrics.json: values, 95 % intervals, tests and
calibration. No TensorFlow is imported, so the metrics of any finished run can be computed again.
"""
