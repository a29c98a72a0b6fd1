"""Prompt suites: the own ones, and readers of the published ones."""

from eval.suites.suite import Prompt as Prompt
from eval.suites.suite import Suite as Suite
