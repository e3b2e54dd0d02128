"""A training loop in Lightning, with dist_mnist's loader unchanged:

torchrun --nproc_per_node=2 tests/examples/with_lightning.py data/mnist
"""

import os
import sys

import lightning
import torch
import torch.distributed.nn.functional  # before a group exists: it would keep the group, and ranks would abort at exit
from torch.nn import functional as F

from dist_mnist import CNN, GlobalOrder, Loader, World, open_data

folder, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 240
world = World.from_environment()
data = open_data(folder)
order = GlobalOrder(num_samples=len(data.train), global_batch_size=250)
every = GlobalOrder(num_samples=len(data.test), global_batch_size=1000, shuffle=False)


class Classifier(lightning.LightningModule):
    """dist_mnist's CNN with loss and optimizer."""

    def __init__(self):
        super().__init__()
        mean, deviation = data.train.pixel_statistics()
        self.model = CNN(data.train.image_shape, data.num_classes, pixel_mean=mean, pixel_std=deviation)
        self.to(memory_format=torch.channels_last)  # the memory format of the images

    def train_dataloader(self):  # called for each epoch, also for the next one after a resume
        first = self.current_epoch * order.steps_per_epoch
        return Loader(data.train, order, range(first, first + order.steps_per_epoch), world)

    def training_step(self, batch, _):
        loss_sum = F.cross_entropy(self.model(batch.images), batch.labels, reduction="sum")
        return loss_sum * world.size / order.batch_size(self.global_step)

    def test_step(self, batch, _):
        correct = (self.model(batch.images).argmax(1) == batch.labels).sum()
        self.log("correct", correct.float(), reduce_fx="sum", sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


trainer = lightning.Trainer(
    devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), num_nodes=world.size // world.local_size, max_steps=steps,
    use_distributed_sampler=False, reload_dataloaders_every_n_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
classifier = Classifier()
trainer.fit(classifier)
[result] = trainer.test(classifier, Loader(data.test, every, range(every.steps_per_epoch), world), verbose=False)
if trainer.is_global_zero:
    print(f"test accuracy {result['correct'] / len(data.test):.2%}")
