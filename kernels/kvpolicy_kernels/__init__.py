"""Triton implementations of `kvpolicy.ops`, under the same names and signatures.

There are none yet: every operation runs its plain-torch definition. The package already has its place and its entry
point so that kernels can be added without moving anything. Importing it never imports triton.
"""
