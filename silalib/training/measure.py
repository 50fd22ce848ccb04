"""The final evaluations of a run, and its record."""

import time
from datetime import UTC, datetime
from itertools import chain

import torch
from safetensors.torch import save as to_safetensors

from .. import data, early_exit
from ..data.batches import in_batches
from ..files import to_csv, to_npz
from ..models import EXITS, count_parameters
from ..randomness import derive
from . import metrics, robustness
from .execution import no_search

FEATURE_IMAGES = 10000  # of each split, at most


def final(training, pauses):
    """(result, files) of a `trainer.Training` whose steps are done: result.json's content, and file name -> bytes.
    None in all processes of network-parallel but the first."""
    pauses.save()  # what follows can take minutes, and is stopped between its parts
    began, run, splits = time.monotonic(), training.run, training.splits
    training.report(final="final evaluations")
    logits = training.at_test or training.predict(splits["test"].images)  # unless a checkpoint begins here
    at_end = training.predict(splits["train"].images)
    with torch.device("meta"):  # without weights: to count with, and in network-parallel those of the others too
        networks = [training.material.network(slot) for slot in range(len(run.nets))]
    heads, arrays = per_head(training, networks, logits, at_end)
    if run.holdout:  # of these images, not augmented, thresholds of early exit are chosen
        held = splits["holdout"]
        arrays["calibration_labels"] = held.labels.cpu().short().numpy()
        for head, z in zip(training.heads, training.predict(held.images)):
            kept = metrics.per_image(z, held.labels, run.nets[0])
            arrays |= {f"calibration_{name}_{head}": kept[name] for name in ("confidence", "predicted")}
    found = features(training, heads) if all(hasattr(net, "embed") for net in networks) else {}
    noise_rows = list(noise(training, pauses)) if run.noise_images else []
    for values, curvature in zip(heads, sharpness(training, pauses) if run.hessian_images else ()):
        values["curvature"] = curvature
    lists = heads, noise_rows, [z.cpu() for z in logits], [z.argmax(1).cpu() for z in at_end], [pauses.cpu_seconds()]
    tensors = {name: getattr(training.material.normalise, name) for name in ("mean", "std")}
    tensors |= {f"{slot}.{k}": v for slot, net in training.nets.items() for k, v in net.state_dict().items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    lists, dicts = zip(*training.ranks.gather((lists, (arrays, found, tensors))))
    if training.ranks.rank:  # the first process has the record
        return None
    heads, noise_rows, logits, predicted, cpu_seconds = (list(chain(*part)) for part in zip(*lists))
    arrays, found, tensors = ({k: v for own in part for k, v in own.items()} for part in zip(*dicts))
    result = {"heads": heads}
    if run.nets[0] not in EXITS and len(heads) > 1:
        result["ensemble"], log_p = metrics.ensemble(logits, splits["test"].labels)
        result["ensemble"]["train_disagreement"] = metrics.disagreement(predicted)
        largest, classes = log_p.max(1)
        arrays |= {"ensemble_predicted": classes.short().numpy(), "ensemble_confidence": largest.exp().half().numpy()}
    files = {"history.csv": to_csv(training.rows), "test.npz": to_npz(arrays)}
    if run.holdout and run.nets[0] in EXITS:
        files["budgeted.csv"] = to_csv(early_exit.sweep(arrays, [head["macs_budgeted"] for head in heads]))
    files |= {"features.npz": to_npz(found)} if found else {}
    files |= {"noise.csv": to_csv(noise_rows)} if noise_rows else {}
    files["weights.safetensors"] = to_safetensors(tensors)
    origin = {k: v for k, v in training.parts[-1].items() if k != "from_step"}
    origin |= {"parts": training.parts} if len(training.parts) > 1 else {}  # which process trained from which step
    origin |= {"data_sha256": training.material.checksum, "train_images": len(splits["train"])}
    origin |= {"seconds": round(training.seconds, 1), "seconds_final": round(time.monotonic() - began, 1)}
    origin |= {"cpu_seconds": round(sum(cpu_seconds), 1), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    return result | {"provenance": origin}, files


def per_head(training, networks, logits, at_end):
    """Of each head here: final metrics, and arrays for test.npz. logits, at_end: of test and of training images."""
    run, (test, train) = training.run, (training.splits[name].labels for name in ("test", "train"))
    image = [training.splits["test"].images.shape[i] for i in (3, 1, 2)]
    macs = chain(*(early_exit.exit_costs(networks[slot], image) for slot in training.nets))
    summaries = zip(metrics.summaries(logits, test), metrics.summaries(at_end, train))
    heads, arrays = [], {"labels": test.cpu().short().numpy()}
    for head, z, train_z, (tested, trained), cost in zip(training.heads, logits, at_end, summaries, macs):
        slot = run.slot(head)
        best = max((row for row in training.rows if row["head"] == head), key=lambda row: row["test_top1"])
        heads.append({"network": run.nets[slot]} | tested | metrics.calibration(z, test))
        heads[-1] |= {"best": best["test_top1"], "best_epoch": best["epoch"]}
        heads[-1] |= {f"train_{k}": v for k, v in trained.items()} | {"train_ece": metrics.ece(train_z.double(), train)}
        heads[-1] |= {"parameters": count_parameters(training.nets[slot]), "macs": cost}
        arrays |= {f"{name}_{head}": a for name, a in metrics.per_image(z, test, run.nets[slot]).items()}
    if run.nets[0] in EXITS:
        for values, cost in zip(heads, early_exit.exit_costs(networks[0], image, budgeted=True)):
            values["macs_budgeted"] = cost
    return heads, arrays


@torch.no_grad()
@no_search()
def features(training, heads):
    """Features before the last layer (Figure 6), its weights, and their scatter ratio into `heads`."""
    arrays = {}
    for (slot, net), values in zip(training.nets.items(), heads):
        net.eval()
        for name in ("test", "train"):
            split, labels = training.splits[name], training.splits[name].labels[:FEATURE_IMAGES]
            batches = in_batches(split.images, training.material.eval_batch, last=FEATURE_IMAGES)
            f = torch.cat([net.embed(training.material.inputs(images)).float() for images in batches])
            arrays[f"{name}_{slot}"] = f.cpu().half().numpy()
            arrays[f"{name}_labels"] = labels.cpu().to(torch.uint8).numpy()
            values[f"{name}_concentration"] = robustness.scatter_ratio(f, labels)
        arrays |= {f"{k}_{slot}": p.detach().cpu().numpy() for k, p in net.fc.named_parameters()}
    return arrays


def noise(training, pauses):
    """Rows of noise.csv (Figure 7b): training NLL under noise on the parameters, on fixed, unaugmented images."""
    run, (images, labels) = training.run, fixed_train_images(training, training.run.noise_images)
    for head, net in training.nets.items():
        predict, seed = lambda net, slot=head: training.predict(images, slot)[0], derive(run.seed, "noise", head)
        for kind in robustness.LARGEST_SIGMA:
            pauses.check()
            curve = robustness.parameter_noise(net, predict, labels, run.noise_sigmas, run.noise_draws, kind, seed)
            yield from ({"head": head} | row for row in curve)
        training.report(final=f"noise, network {head + 1} of {len(run.nets)}")


def sharpness(training, pauses):
    """Largest Hessian eigenvalues of each network's own training NLL, in float32, BatchNorm in evaluation mode."""
    images, labels = fixed_train_images(training, training.run.hessian_images)
    x = training.material.inputs(images)
    for head, net in training.nets.items():
        net.eval()
        loss, values = lambda net=net: metrics.cross_entropy(net(x), labels).mean(), {"images": len(labels)}
        for kind in ("absolute", "filter"):
            pauses.check()
            with no_search():
                found = robustness.largest_eigenvalue(loss, net.parameters(), scaled=kind == "filter")
            values |= zip((kind, f"{kind}_steps", f"{kind}_residual"), found)
        training.report(final=f"sharpness, network {head + 1} of {len(training.run.nets)}")
        yield values


def fixed_train_images(training, n):  # the first n in the balanced order: the same for every run on this data
    split = training.splits["train"]
    chosen = data.balanced_order(split.labels.cpu())[:n].to(training.device)
    return split.images[chosen], split.labels[chosen]
