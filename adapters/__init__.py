"""What travels between coordinator and devices, and how it acts on a base model.

Values, arithmetic and encoding need numpy only; :mod:`bank`, :mod:`targets` and
:mod:`base_model` need torch and are imported by those who train or answer, never by the
serving coordinator.
"""
