"""Evaluation of model folders: an application, run from a checkout as `python -m eval...`."""
