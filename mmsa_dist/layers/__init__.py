"""Bricks that systems share. Every one honours lengths: what stands in padding never changes a result."""
