"""Execution settings: device, precision, memory layout, CUDA graphs. They change results by rounding alone."""

import gc
import re
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

from ..errors import GraphFailed, UserError

EAGER_CALLS = 3  # before a function is captured: cuDNN chooses its algorithms, the optimizer makes its buffers


def pick_device(name):
    """torch.device for "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1". Raises UserError if it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} is not here ({torch.cuda.device_count()} GPUs found): use --device cpu or auto")
    return device


def amx():  # matrix units for bfloat16
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


def bfloat16_pays(device):
    """Whether a device has units for bfloat16. A CPU that only knows its instructions is faster in float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else amx()


def precision(net, device, bf16):
    """The dtype of one network: torch.bfloat16 if `bf16` and the network gains by it on that device, else float32.
    On a CPU depthwise convolutions do not gain. The 12-layer network stays in float32: its two features are drawn."""
    gains = ("resnet", "vgg", "wrn", "densenet", "msdnet") + (("mobilenet",) if device.type == "cuda" else ())
    return torch.bfloat16 if bf16 and net.startswith(gains) else torch.float32


class Speed(NamedTuple):
    """bf16: bfloat16 for the networks that `precision` names. fused: one kernel for the optimizer's step.
    graphs: a whole step, and the evaluation of a batch, are one CUDA graph each."""

    bf16: bool = True
    channels_last: bool = True
    fused: bool = True
    graphs: bool = False


def fast(device, bf16=None, graphs=True):
    """The settings of every training on `device`; bf16 None: where it pays. A CPU has no graphs."""
    return Speed(bfloat16_pays(device) if bf16 is None else bf16, graphs=graphs and device.type == "cuda")


@contextmanager
def one_thread():
    """Measure on one CPU thread, as runs are trained: the CPU time of several counts their waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def no_search(search=False):
    """A context without TF32, and without cuDNN's search for algorithms: no use for shapes that come once."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=search, allow_tf32=False)


@contextmanager
def settings(device):
    """A context for training: on a GPU cuDNN searches for the fastest algorithms, on a stream that can be captured."""
    gpu = device.type == "cuda"
    with no_search(search=gpu), torch.cuda.stream(torch.cuda.Stream(device)) if gpu else nullcontext():
        yield


def cuda_graph(function, inputs):
    """(replay, outputs) of function(*inputs): replay() runs it on what `inputs` then hold, and writes to outputs."""
    graph = torch.cuda.CUDAGraph()
    # the thread that brings streamed images may go on with its own work meanwhile
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        outputs = function(*inputs)
    return graph.replay, outputs


class GraphedCallable:
    """A function of tensors that is replayed as one graph after its first calls; it gives a list of tensors, or None.
    Calls with other shapes run the function itself. What else changes between calls must be in tensors that keep their
    place, like the weights. Raises GraphFailed where it cannot be captured: the process may stay in capture mode."""

    def __init__(self, function, capture=cuda_graph):
        self.function, self.capture, self.calls, self.shapes, self.replay = function, capture, 0, None, None

    def __call__(self, *tensors):
        shapes = [tensor.shape for tensor in tensors]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            with no_search():
                return self.function(*tensors)
        self.calls += 1
        if self.calls <= EAGER_CALLS:
            return self.function(*tensors)
        if self.replay is None:
            self.inputs, collects = [tensor.clone() for tensor in tensors], gc.isenabled()
            gc.collect()
            gc.disable()  # a graph that is collected while another is captured makes the capture invalid
            try:
                self.replay, self.outputs = self.capture(self.function, self.inputs)
            except RuntimeError as error:
                while error.__context__ is not None:  # what ends an invalid capture hides what made it invalid
                    error = error.__context__
                if isinstance(error, torch.OutOfMemoryError):
                    raise error from None
                raise GraphFailed(f"no CUDA graph ({[*str(error).splitlines(), type(error).__name__][0]})") from None
            finally:
                if collects:
                    gc.enable()
        for own, tensor in zip(self.inputs, tensors):
            own.copy_(tensor)
        self.replay()
        return self.outputs and [output.clone() for output in self.outputs]


def wait_for_earlier_steps(queued, device):
    """Add a step's event to the deque `queued`, and wait until at most 16 steps are queued on a GPU, to hear a stop."""
    if device.type == "cuda":
        queued.append(torch.cuda.Event(blocking=True))
        queued[-1].record()
        if len(queued) > 16:
            queued.popleft().synchronize()
