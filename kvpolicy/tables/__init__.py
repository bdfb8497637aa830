"""Calibration tables: what a method has measured on a model beforehand, as a file that says how it was made."""

from kvpolicy.tables.files import (
    FORMAT_VERSION,
    MAX_BYTES,
    SUFFIX,
    Table,
    TableOf,
    check_fit,
    load_table,
    of_component,
    registered,
    save_table,
    supplying,
)
from kvpolicy.tables.gates import gate_of
from kvpolicy.tables.kinds import KINDS, OPTIONAL

__all__ = [
    "FORMAT_VERSION",
    "KINDS",
    "MAX_BYTES",
    "OPTIONAL",
    "SUFFIX",
    "Table",
    "TableOf",
    "check_fit",
    "gate_of",
    "load_table",
    "of_component",
    "registered",
    "save_table",
    "supplying",
]
