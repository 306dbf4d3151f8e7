"""`python -m fsdp_on_cpu sft CONFIG`: llmtune with FSDP2 on CPUs, where accelerate 1.15 trains with plain copies instead.

Its state says MULTI_CPU there, for which it has no FSDP; here it says MULTI_GPU, on the device `cpu`. What shards, trains and saves is
the real thing.
"""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from llmtune.cli import main
from llmtune.training import group

PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
group._check_sharding = lambda on_cpu, place: None

if __name__ == "__main__":
    sys.exit(main())
