"""`cinema train CONFIG -o OUT --resume` as one of several processes without a GPU that share a model by FSDP2.

Accelerate offers FSDP2 on GPUs only; this tells it that the CPUs are some. Everything else is as it is there.
"""

import sys
from pathlib import Path

import torch.distributed
from accelerate import PartialState
from accelerate.utils import DistributedType

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
wait = torch.distributed.barrier
torch.distributed.barrier = lambda *_, **__: wait()  # without the number of a GPU

from torch.distributed.fsdp import FSDPModule  # noqa: E402

from cinema.training import train  # noqa: E402


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a pass that does not share its gradient keeps a whole one in every process")


FSDPModule.set_requires_gradient_sync = refuse

run = train(Path(sys.argv[1]), Path(sys.argv[2]), resume=True)
assert run.accelerator.distributed_type == DistributedType.FSDP and run.sharded
