"""How a run is computed, apart from what it computes: precision, memory layout, compilation, captured CUDA graphs.

Fast and slow are settings of one trainer: `fast` is what a device does best, `PLAIN` what the fast settings are
compared with. They change results by rounding alone.
"""

import gc
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from .errors import GraphFailed

EAGER_CALLS = 3
"""Before a function is captured: cuDNN chooses its algorithms, and the optimizer makes its buffers."""
STEPS_AHEAD = 16
"""So far the host may run ahead of a GPU: it is never idle, and a stop is heard within these steps."""


def amx():
    """Whether this machine's processor has AMX, matrix units for bfloat16."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


def bfloat16_pays(device):
    """Whether a device has units for bfloat16. A CPU that only knows its instructions is faster in float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else amx()


def precision(net, device, half):
    """Of one network: torch.bfloat16 if `half` is true and the network gains by it on that device, else torch.float32.

    On a CPU depthwise convolutions do not gain. The 12-layer network's two features are drawn: it stays in float32
    everywhere.
    """
    gains = ("resnet", "vgg", "wrn", "densenet", "msdnet") + (("mobilenet",) if device.type == "cuda" else ())
    return torch.bfloat16 if half and net.startswith(gains) else torch.float32


@dataclass(frozen=True)
class Speed:
    """half: bfloat16 for the networks that `precision` names. graphs: a whole step, and the evaluation of a batch, are
    captured as one CUDA graph. compiled: torch.compile, of each architecture once, whatever the run and the method."""

    half: bool = True
    channels_last: bool = True
    fused: bool = True
    graphs: bool = False
    compiled: bool = False


PLAIN = Speed(half=False, channels_last=False, fused=False)


def fast(device):
    """The settings of every training on `device`."""
    return Speed(half=bfloat16_pays(device), graphs=device.type == "cuda")


@contextmanager
def one_thread():
    """Measure on one CPU thread, as runs are trained: the CPU time of several counts their waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def settings(device):
    """A context with cuDNN's settings: on a GPU it searches for the fastest algorithm of each shape, once, and float32
    is float32, not TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=device.type == "cuda", allow_tf32=False)


def no_search():
    """A context in which cuDNN searches for no algorithms: for shapes that come once, a search takes longer than it
    saves."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False)


def own_stream(device):
    """A context in which a GPU works on a stream of its own: the default one cannot be captured."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def cuda_graph(function, inputs):
    """Capture function(*inputs) without running it. Returns (replay, outputs): replay() runs it on what `inputs` then
    hold, and writes to `outputs`."""
    graph = torch.cuda.CUDAGraph()
    # the thread that brings streamed images may go on with its own work meanwhile
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        outputs = function(*inputs)
    return graph.replay, outputs


class Captured:
    """A function of tensors that is replayed as one graph after its first calls; it gives a list of tensors, or None.

    A graph has fixed shapes: calls with others run the function itself. What else changes between calls must be in
    tensors that keep their place, like the weights and the learning rate. Raises GraphFailed where it cannot be
    captured: the generator and the allocator may be left in capture mode, so there is no going on in this process.
    """

    def __init__(self, function, capture=cuda_graph):
        self.function, self.capture = function, capture
        self.calls, self.inputs, self.replay = 0, None, None

    def __call__(self, *tensors):
        shapes = [tensor.shape for tensor in tensors]
        if self.calls == 0:
            self.shapes = shapes
        if shapes != self.shapes:
            with no_search():
                return self.function(*tensors)
        self.calls += 1
        if self.calls <= EAGER_CALLS:
            return self.function(*tensors)
        if self.replay is None:
            self.inputs = [tensor.clone() for tensor in tensors]
            collects = gc.isenabled()
            gc.collect()
            gc.disable()  # a graph that is collected while another is captured makes the capture invalid
            try:
                self.replay, self.outputs = self.capture(self.function, self.inputs)
            except RuntimeError as error:
                while error.__context__ is not None:  # what ends an invalid capture hides what made it invalid
                    error = error.__context__
                if isinstance(error, torch.OutOfMemoryError):
                    raise error from None
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise GraphFailed(f"no CUDA graph ({reason})") from None
            finally:
                if collects:
                    gc.enable()
        for own, tensor in zip(self.inputs, tensors):
            own.copy_(tensor)
        self.replay()
        return self.outputs and [output.clone() for output in self.outputs]


class Ahead:
    """Keeps the host a few steps ahead of a GPU, so that neither waits for the other; nothing on a CPU."""

    def __init__(self, device):
        self.gpu, self.events = device.type == "cuda", deque()

    def step(self):
        if self.gpu:
            self.events.append(torch.cuda.Event(blocking=True))
            self.events[-1].record()
            if len(self.events) > STEPS_AHEAD:
                self.events.popleft().synchronize()
