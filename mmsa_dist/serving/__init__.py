"""What travels with a registered model and answers requests."""
