"""Packing and reading beside every rival, a rank's memory, and how a run comes back in the middle of an epoch.

See `benchmarks.data.__main__` for what is measured and how.
"""
