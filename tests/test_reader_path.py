"""The way from a hidden state to its slot in the cache: which files it enters, and in which order."""

import sys
from pathlib import Path

import torch

import dms_core
import dms_kernels
from dms_core.cache.dms import DMSCache

HIDDEN_TO_SLOT = [  # "Where things are" in README.md
    "dms_core/model.py",
    "dms_core/gate.py",
    "dms_core/attention.py",
    "dms_core/cache/dms.py",
    "dms_kernels/__init__.py",
    "dms_kernels/rows.py",
]
# What a step only asks for a value or a size: settings, and the parts that every cache shares.
SHARED = {"dms_core/config.py", "dms_core/cache/base.py", "dms_core/cache/pages.py"}
ROOTS = [Path(package.__file__).parents[1] for package in (dms_core, dms_kernels)]


def files_entered(function) -> list[str]:
    """Files of the two packages in the order in which ``function`` first enters them."""
    entered = {}

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_name != "<module>":
            file = Path(code.co_filename)
            for root in ROOTS:
                if root in file.parents and file.relative_to(root).parts[0] in ("dms_core", "dms_kernels"):
                    entered.setdefault(file.relative_to(root).as_posix())

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return list(entered)


@torch.no_grad()
def test_decode_step_enters_the_named_files_in_order(tiny_model):
    model, ids = tiny_model(), torch.arange(1, 8)[None]
    cache = DMSCache.for_model(model)
    model(ids, past_key_values=cache)
    entered = files_entered(lambda: model(ids[:, :1], past_key_values=cache))
    assert [file for file in entered if file in HIDDEN_TO_SLOT] == HIDDEN_TO_SLOT
    before_slot = entered[: entered.index(HIDDEN_TO_SLOT[-1])]
    assert set(before_slot) - SHARED == set(HIDDEN_TO_SLOT[:-1])
