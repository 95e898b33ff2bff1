"""Sharding from outside: what a sharded model sees is what it sees alone."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from paella.config import PRESETS
from paella.parallel import gathered, shard
from paella.training import Keep, TextToTokens


def _worker(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = TextToTokens(PRESETS["tiny"]).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    whole = TextToTokens(PRESETS["tiny"]).eval()
    whole.load_state_dict(model.state_dict())
    shard(model, torch.bfloat16)
    whole.bfloat16()
    tokens, t = torch.randint(512, (2, 16, 16)), torch.tensor([0.40507, 0.9171])
    text = whole.text.tokenize(["a small red circle", "blue"])
    some = torch.tensor([True, False])
    inputs = (tokens, t, text.ids, text.mask, Keep(some, some, some))
    with torch.no_grad():
        expected = whole(*inputs)
        assert torch.equal(model(*inputs), expected), "noise levels must reach the model unrounded"
        with gathered(model):
            if rank == 0:  # workers may make different numbers of passes
                conditions = {"byt5": model.text.states(text.ids, text.mask), "byt5_mask": text.mask}
                plain = whole.unet(tokens, t, byt5=whole.text.states(text.ids, text.mask), byt5_mask=text.mask)
                assert torch.equal(model.unet(tokens, t, prepared=model.unet.prepare(**conditions)), plain)
        assert torch.equal(model(*inputs), expected)
    dist.destroy_process_group()


def test_a_sharded_model_predicts_what_the_whole_one_does(tmp_path):
    mp.spawn(_worker, (str(tmp_path / "store"),), nprocs=2)
