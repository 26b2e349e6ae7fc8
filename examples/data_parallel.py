"""DistributedDataParallel around each part: torchrun --nproc-per-node 2 data_parallel.py"""

import torch
import torch.distributed as dist
from halves import accuracy, loaders, make_model
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import mla_fast as mla


def main(epochs=10, size=None):
    dist.init_process_group("gloo")  # nccl on GPUs
    train, held_out = loaders(size)
    batches = DataLoader(train.dataset, 16, sampler=DistributedSampler(train.dataset))
    model = mla.distribute(make_model())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mla.MLAOptimizer(sgd, model.head, projection="window", target="update")
    mla.Trainer(model, optimizer, progress=False).fit(batches, epochs)
    return accuracy(model, held_out)


if __name__ == "__main__":
    print(f"fused accuracy {100 * main():.1f} %")
    dist.destroy_process_group()
