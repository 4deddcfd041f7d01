"""What a cluster runs: one short entry point per job."""
