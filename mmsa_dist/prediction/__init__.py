"""Predictions for whole data sets: what a row is, and the same rows from many processes of a Ray cluster."""
