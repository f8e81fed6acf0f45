"""Tests of pyvmm.devices."""
