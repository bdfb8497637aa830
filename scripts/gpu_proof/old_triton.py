"""Lets triton before 3.9 interpret beside numpy 2.4 and newer; parts of a dry run import it as `sitecustomize`.

Its interpreter makes integers of arrays that hold one number, which this numpy refuses: no loop would run.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        patch = interpreter._patch_lang_tensor  # noqa: SLF001  there is no other place

        def patched(tensor, *scope):  # noqa: ANN001, ANN002, ANN201, D103
            patch(tensor, *scope)
            for each in scope:
                each.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patched  # noqa: SLF001
