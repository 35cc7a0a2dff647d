"""Measurements put their inputs on the model's device; shown without a GPU, on the meta device."""

import pytest

from companion.experiments.delay import Case, interchange
from companion.experiments.fidelity import Decoder
from companion.experiments.heldout import cache_report, held_out, kept_tokens
from companion.tasks.reasoner import make_model, make_tokenizer
from dms_core.config import DMSConfig
from dms_core.model import attach

IDS = [5, 6, 7, 8]
MEASUREMENTS = {
    "held_out": lambda model: held_out(model, None, [{"input_ids": IDS, "labels": IDS}], pad=0),
    "kept_tokens": lambda model: kept_tokens(model, IDS),
    "cache_report": lambda model: cache_report(model, make_tokenizer(), "?a;a=3;!", 1.0),
    "interchange": lambda model: interchange(model, [Case(tuple(IDS), 0, 1, 2, "result")], 1),
    "Decoder": lambda model: Decoder(model, None, [IDS, IDS[1:]], 0),
}


class Reached(Exception):
    """The model was called; the message is the device of its token ids."""


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_token_ids_are_on_the_device_of_the_model(name, monkeypatch):
    model = attach(make_model(80), DMSConfig()).eval().to("meta")

    def stop(input_ids, **inputs):
        raise Reached({x.device.type for x in (input_ids, inputs.get("attention_mask", input_ids))})

    monkeypatch.setattr(model, "forward", stop)
    monkeypatch.setattr(model, "generate", stop)
    with pytest.raises(Reached, match=r"^\{'meta'\}$"):
        MEASUREMENTS[name](model)
