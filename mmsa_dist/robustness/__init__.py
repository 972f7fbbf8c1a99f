"""What a trained system still answers where a modality is missing or corrupted."""
