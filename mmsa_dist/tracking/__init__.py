"""MLflow: runs, their numbers and pictures, models and their versions. Importing this imports no MLflow."""

from mmsa_dist.tracking.run import end_run, finish_run, open_run
from mmsa_dist.tracking.tracker import Link, MlflowTracker, NullTracker, Tracker, open_tracker

__all__ = ["Link", "MlflowTracker", "NullTracker", "Tracker", "end_run", "finish_run", "open_run", "open_tracker"]
