"""Batch scoring: a log of (user, candidates) in, as many rows with probabilities out."""
