"""The server of the fixture `group`: its processes are forked with these modules imported."""
import gc

gc.disable()  # imports leave little garbage

import conftest  # noqa: E402
import torch._dynamo  # noqa: E402, F401 which torch itself imports in an optimizer's first step

import train  # noqa: E402, F401

conftest.freeze_imports()
