"""The file that MLflow runs to get the model (models from code: nothing is pickled).

A copy of it lies in every registered model, beside a copy of `shards` and `mmsa_dist`.
"""

from mlflow.models import set_model

from mmsa_dist.serving.served import ServedSystem

set_model(ServedSystem())
