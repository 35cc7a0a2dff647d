"""A model's own logits of given hidden states, scaled, shifted or capped as its family does it.

The model's own ``forward`` runs, and what stands for its decoder in that call returns the hidden states.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dms_core.probe import decoder_of


class _Output(BaseModelOutputWithPast):
    """A decoder's output in which whatever else a model may look for, such as router_logits, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _StandIn:
    """Stands for a module around ``decoder``: called, it returns ``hidden``, else it has the module's attributes."""

    def __init__(self, module: nn.Module, decoder: nn.Module, hidden: Tensor, calls: list) -> None:
        self.__module, self.__given = module, (decoder, hidden, calls)  # names that no module has

    def __call__(self, *args, **kwargs) -> _Output:
        _, hidden, calls = self.__given
        calls.append(self)
        return _Output(last_hidden_state=hidden)

    def __getattr__(self, name: str):
        value = getattr(self.__module, name)
        return _StandIn(value, *self.__given) if _holds(value, self.__given[0]) else value


def _holds(part: object, decoder: nn.Module) -> bool:
    return isinstance(part, nn.Module) and any(module is decoder for module in part.modules())


@contextlib.contextmanager
def _decoder_returns(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Inside, the decoder of ``model``, when called as its part, returns ``hidden``.

    An attribute of the instance goes before a submodule of that name, which stays where it is.
    """
    decoder = decoder_of(model)
    calls: list = []
    name = next(name for name, child in model.named_children() if _holds(child, decoder))
    vars(model)[name] = _StandIn(getattr(model, name), decoder, hidden, calls)
    try:
        yield
    finally:
        del vars(model)[name]
    if not calls:
        raise ValueError(f"{type(model).__name__}: its forward must call its decoder as {name!r}")


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (N, V) of the decoder's last hidden states (N, d), as ``model(...)`` makes them."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # what PEFT wraps
    with _decoder_returns(model, hidden[None]):
        return model.forward(inputs_embeds=hidden[None], use_cache=False, return_dict=True).logits[
            0
        ]  # no hooks: not those of the gates
