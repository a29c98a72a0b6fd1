"""The parser of every command line here: bad arguments are bad input, one line without the usage text."""

from __future__ import annotations

import argparse
from typing import NoReturn

from cascade.errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and exit. `prog` is what a user types."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")
