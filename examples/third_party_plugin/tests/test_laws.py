"""Every law that holds for the components and policies of this package."""

from example_plugin.allocator import ExamplePluginSlope
from example_plugin.scorer import ExamplePluginSize

from kvpolicy.testing import laws_of

test_laws = laws_of(ExamplePluginSize, ExamplePluginSlope, "example-plugin", "example-plugin-slope")
