"""The algorithm core: pure functions of tensors and numbers.

Everything here decides and nothing carries: no I/O, no clock, no global random state, no
configuration objects. Tensors come first, every number after them is named by the caller.
"""
