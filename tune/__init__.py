"""What searching and comparing is: search spaces, sweeps, and the papers' tables."""
