"""Hyperparameter search by KerasTuner or Optuna on the validation split.

What enters is an experiment with a search space. What leaves is the best set of keys, with all trials on record. The test
split stays closed until the search has ended.
"""
