"""A policy: the composition of its components and its decision, pure: views in, kept slots out."""
