"""Benchmarks: what the method promises by its token count, beside what this machine reaches.

    train.py      targets/s of the sliding window, padded and packed, and of DTI, against the FLOP bound
    attention.py  one backend against the dense mask on a row of a given length
    pack.py       targets/s of packing, one core
    timing.py     interleaved repetitions

Absolute times on a shared machine mean little; every figure here is a ratio within one process, from
repetitions that take turns.
"""
