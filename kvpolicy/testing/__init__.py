"""For tests of kvpolicy and of its plugins.

`oracle` is a second, plain implementation of every bundled component and of the engine; `trace` records what a real
model does under a `PolicyCache`; `alone` compares rows of a batch with the same rows alone; `tiny` makes small random
models. Only `trace`, `alone` and `tiny` need transformers.
"""
