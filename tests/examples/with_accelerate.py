"""A training loop with Hugging Face Accelerate; dist_mnist's sampler divides the batches among the ranks:

torchrun --nproc_per_node=2 tests/examples/with_accelerate.py data/mnist
"""

import sys

import torch
import torch.distributed.nn.functional  # before a group exists: it would keep the group, and ranks would abort at exit
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dist_mnist import CNN, GlobalOrder, ShardedBatchSampler, collate, open_data

folder, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 240
accelerator = Accelerator(cpu=not torch.cuda.is_available())
rank, ranks = accelerator.process_index, accelerator.num_processes

data = open_data(folder)
mean, deviation = data.train.pixel_statistics()
model = CNN(data.train.image_shape, data.num_classes, pixel_mean=mean, pixel_std=deviation)
model.to(memory_format=torch.channels_last)  # the memory format of the images
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
model, optimizer = accelerator.prepare(model, optimizer)  # not the loader: the sampler already shards

order = GlobalOrder(num_samples=len(data.train), global_batch_size=250)
sampler = ShardedBatchSampler(order, range(steps), rank, ranks)
for step, batch in enumerate(DataLoader(data.train, batch_sampler=sampler, collate_fn=collate)):
    images, labels = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
    loss_sum = F.cross_entropy(model(images), labels, reduction="sum")
    optimizer.zero_grad()
    accelerator.backward(loss_sum * ranks / order.batch_size(step))
    optimizer.step()

model.eval()
every = GlobalOrder(num_samples=len(data.test), global_batch_size=1000, shuffle=False)
shares = ShardedBatchSampler(every, range(every.steps_per_epoch), rank, ranks)
right = torch.zeros((), dtype=torch.int64, device=accelerator.device)
with torch.inference_mode():
    for batch in DataLoader(data.test, batch_sampler=shares, collate_fn=collate):
        right += (model(batch.images.to(accelerator.device)).argmax(1).cpu() == batch.labels).sum()
right = accelerator.reduce(right)
accelerator.print(f"test accuracy {right.item() / len(data.test):.2%}")
model, optimizer = accelerator.free_memory(model, optimizer)  # DDP keeps a reference to the group, too
accelerator.end_training()
