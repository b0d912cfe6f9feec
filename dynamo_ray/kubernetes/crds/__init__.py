"""Strict JSON schemas of the custom resources that we render, derived from their CRDs by `derive.py`."""
