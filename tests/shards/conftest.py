"""Settings of the tests of data."""

from hypothesis import settings

# a busy machine is slow, not wrong; and a failure must be the same failure when it is run again
settings.register_profile("data", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("data")
