"""The server of the fixture `group`: its processes are forked with these modules imported."""
import gc

gc.disable()  # what modules hold stays, so nobody looks for garbage in it

import conftest  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401 which torch itself imports in an optimizer's first step

import train  # noqa: E402, F401

gc.freeze()  # a search would write to every object, whose page each process then has to copy
gc.set_threshold(20_000, 20, 50)
gc.enable()
