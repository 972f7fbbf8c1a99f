"""Where it runs: submission to a Ray cluster. Talks to the rest through the command line only."""
