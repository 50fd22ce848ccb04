"""How much time real early exit saves: python benchmarks/early_exit.py [--device cuda] [--threads N]

An MSDNet with random weights runs images to the end and with early exit, alternately, at several batch sizes; the
thresholds let equal shares of the images leave at every exit (q = 1), or more at the early ones (q = 0.5). The ratios
are of one run, so they can be compared between machines; beside them stands the ratio of the costs in MACs.
"""

import argparse

import torch

from silalib.early_exit import EarlyExit, exit_costs, exit_distribution, exit_index, milliseconds, thresholds
from silalib.models import MODELS
from silalib.training.execution import pick_device
from silalib.training.provenance import processor


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--images", type=int, default=256)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if gpu else f"{processor()}, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}, float32, {options.images} images of 3x32x32")
    for name in ("msdnet_budgeted", "msdnet_anytime"):
        torch.manual_seed(0)
        network = MODELS[name](100).to(device).eval()
        images = torch.randn(options.images, 3, 32, 32, device=device)
        with torch.no_grad():
            confidence = torch.stack(network(images)).softmax(2).amax(2).cpu().numpy()
        costs = exit_costs(network, (3, 32, 32), budgeted=True)
        print(f"\n{name}\n  q   batch   to the end   early exit   (ms an image)   ratio   ratio in MACs")
        for q in (1.0, 0.5):
            limits = thresholds(confidence, exit_distribution(q, len(costs)))
            spent = sum(costs[k] for k in exit_index(confidence, limits)) / len(images)
            for batch in options.batches:
                whole = milliseconds(network, images, batch)
                early = milliseconds(EarlyExit(network, limits), images, batch)
                print(
                    f"{q:4}{batch:7}{whole:13.3f}{early:13.3f}{'':17}{whole / early:6.2f}{costs[-1] / spent:14.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
