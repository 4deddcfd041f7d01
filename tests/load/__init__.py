"""A server under load: `python -m tests.load`. Needs the extra `load`."""
