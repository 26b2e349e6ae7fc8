"""FSDP2, every part split over the ranks, the head by rows: torchrun --nproc-per-node 2 fully_sharded.py"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from halves import accuracy, loaders, make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import mla_fast as mla


def main(epochs=10, size=None):
    dist.init_process_group("gloo")  # nccl on GPUs
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    train, held_out = loaders(size)
    batches = DataLoader(train.dataset, 16, sampler=DistributedSampler(train.dataset))
    model = make_model()
    for part in (*model.encoders.values(), model.head):
        fully_shard(part, mesh=mesh)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mla.MLAOptimizer(sgd, model.head, projection="window", target="update")  # after the weights were split
    for _ in range(epochs):
        for inputs, target in batches:
            for modality, x in inputs.items():
                optimizer.zero_grad()
                F.cross_entropy(model({modality: x})[modality], target).backward()
                optimizer.step(modality=modality)
    return accuracy(model, held_out)


if __name__ == "__main__":
    print(f"fused accuracy {100 * main():.1f} %")
    dist.destroy_process_group()
