"""What training is: systems, label generators, metrics, the engine, the loop, tracking and prediction."""
