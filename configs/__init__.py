"""Experiments, one page each."""
