"""Hyperparameter search by KerasTuner or Optuna on the validation split.

The input is an experiment with a search space. The output is the best set of keys, with a record of all trials. The
test split is not used until the search has ended.
"""
