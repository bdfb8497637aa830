"""Runtimes: where policies meet a model. Nothing inside the core imports them."""
