"""A training loop in plain PyTorch, for any number of processes:

torchrun --nproc_per_node=2 tests/examples/plain.py data/mnist
"""

import sys

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dist_mnist import CNN, GlobalOrder, Loader, World, open_data, process_group, use_device
from dist_mnist.evaluation.evaluate import evaluate

folder, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 240
data = open_data(folder)
order = GlobalOrder(num_samples=len(data.train), global_batch_size=250)
mean, deviation = data.train.pixel_statistics()
model = CNN(data.train.image_shape, data.num_classes, dropout=0.0, pixel_mean=mean, pixel_std=deviation)

world = use_device(World.from_environment())  # this rank's GPU, or its part of the CPU cores
with process_group(world, timeout_s=600):
    model.to(world.device, memory_format=torch.channels_last)  # the memory format of the images
    network = DistributedDataParallel(model) if world.size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step, batch in enumerate(Loader(data.train, order, range(steps), world)):
        # DDP averages over ranks, whose parts of a batch may differ in size by one: sum, and divide by the global size.
        loss_sum = F.cross_entropy(network(batch.images), batch.labels, reduction="sum")
        optimizer.zero_grad()
        (loss_sum * world.size / order.batch_size(step)).backward()
        optimizer.step()
    result = evaluate(model.eval(), data.test, data.num_classes, world)
if world.is_main:
    print(f"test accuracy {result.accuracy:.2%}, loss {result.loss:.5f}")
