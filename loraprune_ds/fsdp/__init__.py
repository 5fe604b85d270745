"""The engine of a model that FSDP2 shards by rows: `torch.distributed.fsdp.fully_shard`."""
