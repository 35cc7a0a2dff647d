"""A step of static shapes, replayed as one CUDA graph: without it a GPU waits for Python at small batches.

What the step reads and writes must lie in tensors that stay where they are; when one has moved, as a cache's pool does
when it grows, the step is captured again.  On other devices the step is simply called.
"""

import warnings
from collections.abc import Callable

import torch

from dms_core.rope import varying_rope


class StepGraph:
    """``run()`` does what ``step()`` does, and ``why_not`` says why it is no graph, if it is none.

    ``moved()`` returns a number that changes when a tensor that the step uses was replaced.  ``ran(steps)``
    corrects the host's counters of steps: 1 after a replay, which Python did not run; -1 after a capture, which Python
    ran and the GPU did not; 0 after a failed capture.  ``failed(reason)`` is called after such a one.
    """

    def __init__(
        self,
        step: Callable[[], None],
        moved: Callable[[], int],
        ran: Callable[[int], None],
        failed: Callable[[str], None],
        why_not: str = "",
    ) -> None:
        self.step, self.moved, self.ran, self.failed, self.why_not = step, moved, ran, failed, why_not
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured_at: int | None = None

    def run(self) -> None:
        if self.why_not:
            return self.step()
        if (now := self.moved()) != self.captured_at:
            self.graph = None
            self.step()  # also compiles and warms up what will be captured
            self.captured_at = now
        elif self.graph is None:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
            self.ran(1)

    def _capture(self) -> None:
        """Capture the step; a model for which this cannot be done goes on as it is."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # a stream of this card: torch's own for captures is of the card that had the first one
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self.step()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a broken capture leaves its own behind
            self.why_not = f"capture failed: {str(error).splitlines()[0]}"
            self.failed(self.why_not)
            warnings.warn(f"decoding without a CUDA graph; {self.why_not}", stacklevel=2)
            torch.cuda.synchronize()
            self.ran(0)
            self.step()
        else:
            self.ran(-1)
            self.graph = graph


def why_no_graph(model, cache) -> str:
    """Why decode steps of ``model`` with ``cache`` cannot be captured; empty if they can."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model lies on {len(devices)} devices"
    device = next(iter(devices))
    if device.type != "cuda":
        return "not on CUDA"
    if device.index != torch.cuda.current_device():  # the capture would be of another card's stream
        return f"{device} is not the current card: torch.cuda.set_device({device.index}) makes it so"
    if rope := varying_rope(model.config):
        return f"rope_type {rope[0]} waits for the device at each step"
    if not cache.static:
        return f"{type(cache).__name__}: its steps change shapes"
    if model.dms.split.size > 1:
        return "the model is spread over processes"
    return model.dms.no_graph
