"""The data path: sources, interactions, prompts, plan, packing, pipeline."""
