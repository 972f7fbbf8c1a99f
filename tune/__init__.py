"""What searching is: search spaces and sweeps."""
