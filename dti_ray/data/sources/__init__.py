"""Readers of raw logs: each turns its files into the two canonical tables.

Stage: first of the data path. In: raw files. Out: an `InteractionTable` (rows as `RAW_INTERACTIONS`, not
yet checked) and an `ItemTable`.
Invariant: a reader converts names, never values; what is wrong with a row is for `interactions` to say.
"""
