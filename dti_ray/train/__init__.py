"""Training: engine, checkpoint, loop, launch."""
