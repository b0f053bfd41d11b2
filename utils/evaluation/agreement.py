"""How near a network is to its teacher on validation images that have no labels: what "best" goes by without them."""

from utils import datasets, processes
from utils.datasets import loaders, samples


def agreement(compute, loader, device, weights):
    """-> {"rain/agreement": minus the weighted sum of the losses, "rain/<loss>": each of them}, means over the images.

    Every image is asked about by itself, so that neither the batch size nor the number of processes changes the score.

    Args:
        compute: batch of one image, see datasets.to_device -> {loss: scalar Tensor}, without a word with other ranks,
            which may have fewer images (distillation.compared: over_ranks=False).
        loader: of loaders.validation_loader, its samples with clean twins; weights: {loss: weight} of those that count.
    """
    def found(batch):
        several = [compute(datasets.to_device(one, device)) for one in samples.parts(batch, 1)]
        return [{name: terms[name].item() for name in weights} for terms in several]
    means = processes.mean_over_ranks([one for several in loaders.each(found, loader) for one in several])
    total = sum(weight * means[name] for name, weight in weights.items())
    return {"rain/agreement": -total} | {f"rain/{name}": value for name, value in means.items()}
