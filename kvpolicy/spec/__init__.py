"""Policy specifications: files, Python and JSON schema."""

from kvpolicy.spec.model import PolicySpec, load
from kvpolicy.spec.reference import ComponentRef
from kvpolicy.spec.schema import json_schema

__all__ = ["ComponentRef", "PolicySpec", "json_schema", "load"]
