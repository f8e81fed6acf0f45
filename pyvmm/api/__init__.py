"""What ``import pyvmm`` offers to notebooks and tests: a machine in a few lines, its exits one by one.

Stable: names and meanings here change only with the major version.
"""
