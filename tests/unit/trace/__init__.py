"""Tests of pyvmm.trace."""
