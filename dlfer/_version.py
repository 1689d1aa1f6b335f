"""The version of dlfer, in a module that the build reads without importing anything else."""

__version__ = "0.2.0"
