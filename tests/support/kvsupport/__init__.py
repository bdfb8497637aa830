"""What only the tests of kvpolicy itself need; it is not part of the distribution.

`oracle` is a second, plain implementation of every bundled component and of the engine; `trace` writes down what a
real model does under a `PolicyCache`; `audit` looks over what was written, under any policy; `alone` compares the rows
of a batch with the same rows alone; `mutants` are components and cores that are broken on purpose; `recordings` and
`scripted` make recordings and study results without a model.
"""
