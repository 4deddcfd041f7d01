"""Using a trained model: evaluation and the baselines it is held against."""
