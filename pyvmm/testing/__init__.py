"""For people's own test suites: reading test images' output, TAP and JUnit, and a pytest fixture for guests.

``pytest_plugin`` has the ``vm`` fixture and its documentation; pytest finds it by itself where pyvmm is installed.
"""
