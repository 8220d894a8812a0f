# SPDX-License-Identifier: Apache-2.0
"""The range of a whole mini-batch: weights and gradients don't depend on how the mini-batch is split.

verl's own loop over micro-batches, `FSDPEngine.forward_backward_batch`, runs here over gloo on one and two processes,
with a policy of a few logits in the model's place.
"""

import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from losses import actor_config, loss_inputs
from tensordict import TensorDict
from verl.steer.engine.normalizer import (
    NOTHING_VALID,
    RANGE_FILE,
    TokenWeightNormalizer,
    gather,
    mean_range,
    old_policy_range,
)
from verl.steer.loss import ppo_loss
from verl.trainer.ppo.core_algos import EntropyChangeRange, estimate_entropy_change, signed_entropy_change
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

SEQUENCES, ACTIONS = 8, 5


class ToyEngine(TokenWeightNormalizer, FSDPEngineWithLMHead):
    """verl's loop over the micro-batches of a policy with a logit for each place of a response and each action."""

    ulysses_sequence_parallel_size, ulysses_device_mesh = 1, None

    def __init__(self):
        self.logits = torch.nn.Parameter(torch.randn(16, ACTIONS, generator=torch.Generator().manual_seed(5)))

    def _gradient_sync_context(self, *, is_last_micro_batch):
        return nullcontext()

    def forward_step(self, micro_batch, loss_function, forward_only):
        rows = []
        for ids, prompt in zip(micro_batch["input_ids"].unbind(), micro_batch["prompts"].unbind(), strict=True):
            # As a model's: the log-prob of a token stands at the place before it.
            places = torch.arange(len(ids)) - len(prompt) + 1
            log_prob = self.logits.log_softmax(-1)[places.clamp(0, 15)]
            rows.append(log_prob.gather(-1, ids.roll(-1)[:, None])[:, 0])
        output = {"log_probs": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}
        loss, metrics = loss_function(model_output=output, data=micro_batch, dp_group=self.get_data_parallel_group())
        return loss, {"loss": loss.detach().item(), "metrics": metrics}


def mini_batch(start, stop):
    """Sequences of one mini-batch of `SEQUENCES`, ragged, the last token of each second response not valid."""
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 9, 1, 6, 12, 2, 7, 5]
    rows = {name: [] for name in ("prompts", "responses", "input_ids", "response_mask", "loss_mask")}
    rows |= {name: [] for name in ("old_log_probs", "advantages", "entropy")}
    for index, length in enumerate(lengths):
        prompt = torch.ones(2, dtype=torch.long)
        response = torch.randint(ACTIONS, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.long)
        if index % 2:
            mask[-1] = 0
        rows["prompts"].append(prompt)
        rows["responses"].append(response)
        rows["input_ids"].append(torch.cat((prompt, response)))
        rows["response_mask"].append(mask)
        rows["loss_mask"].append(mask)
        rows["old_log_probs"].append(-3 * torch.rand(length, generator=generator))
        rows["advantages"].append(torch.randn(length, generator=generator))
        rows["entropy"].append(2 * torch.rand(length, generator=generator))
    nested = {
        name: torch.nested.as_nested_tensor(values[start:stop], layout=torch.jagged) for name, values in rows.items()
    }
    return TensorDict(nested, batch_size=stop - start)


def update(rank, ranks, micro_batch_size, options):
    """Gradient of one mini-batch, as the ranks' mean, and the extremes of its weights on this rank.

    A micro-batch size above 8 is a number of tokens, by which verl packs a dynamic number of sequences.
    """
    engine, part = ToyEngine(), SEQUENCES // ranks
    data = mini_batch(rank * part, (rank + 1) * part)
    dynamic = micro_batch_size > SEQUENCES
    size = {"max_token_len_per_gpu" if dynamic else "micro_batch_size_per_gpu": micro_batch_size}
    tu.assign_non_tensor(data, use_dynamic_bsz=dynamic, global_batch_size=SEQUENCES, **size)
    config = actor_config(**options)
    output = engine.forward_backward_batch(data, partial(ppo_loss, config=config), forward_only=False)
    gradient = engine.logits.grad
    torch.distributed.all_reduce(gradient)
    metrics = output["metrics"]
    lowest, highest = (float(metrics[f"actor/token_weights_{end}"].aggregate()) for end in ("min", "max"))
    return gradient / ranks, lowest, highest


def worker(rank, ranks, folder, cases):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    results = [update(rank, ranks, *case) for case in cases]
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def run(ranks, folder, cases):
    """Results of each rank for each case; a single rank is this process."""
    folder.mkdir()
    if ranks == 1:
        worker(0, 1, folder, cases)
    else:
        torch.multiprocessing.spawn(worker, (ranks, str(folder), cases), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


MAPS = {
    "linear": {},
    "exponential": {"linear": False},
    "threshold": {"token_weight_map": "threshold"},
    "clip_aware": {"entropy_change_estimator": "clip_aware"},
    "asymmetric": {"entropy_control_mode": "asymmetric"},
}


def test_the_split_of_a_mini_batch_changes_nothing(tmp_path):
    """Micro-batches of 1, 2, 4 and 8 on one rank, of 1, 2 and 4 on two, and packed ones: one gradient, one range.

    Where each micro-batch is measured by itself the gradients differ.
    """
    micro_batches = {1: (1, 2, 4, 8, 20), 2: (1, 2, 4, 16)}
    for_map = {
        ranks: [
            (size, {**options, "token_weight_normalizer": normalizer})
            for normalizer in ("global", "micro_batch")
            for options in MAPS.values()
            for size in sizes
        ]
        for ranks, sizes in micro_batches.items()
    }
    found = {ranks: run(ranks, tmp_path / str(ranks), cases) for ranks, cases in for_map.items()}
    for name, options in MAPS.items():
        for normalizer in ("global", "micro_batch"):
            wanted = {**options, "token_weight_normalizer": normalizer}
            gradients, lowest, highest = [], [], []
            for ranks, cases in for_map.items():
                for place, (_, of_case) in enumerate(cases):
                    if of_case == wanted:
                        gradients += [found[ranks][rank][place][0] for rank in range(ranks)]
                        lowest.append(min(found[ranks][rank][place][1] for rank in range(ranks)))
                        highest.append(max(found[ranks][rank][place][2] for rank in range(ranks)))
            spread = max((gradient - gradients[0]).abs().max().item() for gradient in gradients)
            scale = gradients[0].abs().max().item()
            print(f"{name:12} {normalizer:12} largest difference {spread:.1e} of {scale:.1e}")
            if normalizer == "global":
                assert spread < 1e-6 and max(lowest) - min(lowest) < 1e-6 and max(highest) - min(highest) < 1e-6
            else:
                assert spread > 1e-3 * scale


def test_the_range_is_that_of_the_estimate_at_the_old_policy(one_rank):
    data, options = mini_batch(0, SEQUENCES), actor_config(token_weight_map="threshold").policy_loss
    flat = {name: data[name].values() for name in ("advantages", "entropy", "old_log_probs", "response_mask")}
    columns = ("advantages", "entropy", "old_log_probs", "old_log_probs")
    change = estimate_entropy_change(loss_inputs(*(flat[name] for name in columns)))
    change = change[flat["response_mask"] == 1].sort().values
    expected = (change[0], change[-1], change[int(0.8 * (len(change) - 1))])
    assert old_policy_range(data, options, None) == pytest.approx(tuple(map(float, expected)))
    signed = signed_entropy_change(loss_inputs(*(flat[name] for name in columns)))[flat["response_mask"] == 1]
    found = old_policy_range(data, actor_config(entropy_control_mode="asymmetric").policy_loss, None)
    assert found[:2] == pytest.approx((float(-signed.max()), float(-signed.min()))) and found[0] < 0 < found[1]


def test_a_mini_batch_without_valid_tokens_has_no_range_of_its_own(one_rank):
    data, options = mini_batch(0, 2), actor_config().policy_loss
    data["response_mask"] = data["response_mask"] * 0
    assert old_policy_range(data, options, None) is NOTHING_VALID
    past = EntropyChangeRange(1.0, 2.0)
    assert mean_range(past, NOTHING_VALID, 0.9) == past and mean_range(None, NOTHING_VALID, 0.9) is NOTHING_VALID


def test_missing_entropies_are_named(one_rank):
    data = mini_batch(0, 2)
    del data["entropy"]
    with pytest.raises(ValueError, match="token_weight_normalizer=global: expected micro_batch where"):
        old_policy_range(data, actor_config(token_weight_normalizer="global").policy_loss, None)


def test_the_running_range_by_hand():
    """0.75 * 4 + 0.25 * 8 = 5 and 0.75 * 10 + 0.25 * 2 = 8; a first range is taken as it is."""
    past, present = EntropyChangeRange(4.0, 10.0), EntropyChangeRange(8.0, 2.0)
    assert mean_range(past, present, 0.75) == EntropyChangeRange(5.0, 8.0)
    assert mean_range(None, present, 0.75) == present
    # The threshold map was switched on meanwhile.
    assert mean_range(past, EntropyChangeRange(8.0, 2.0, 3.0), 0.75) == EntropyChangeRange(5.0, 8.0, 3.0)


def alone(rank, folder):
    """Gathers in a group of rank 0 alone; rank 1 takes no part and is gone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    groups = [torch.distributed.new_group([member]) for member in range(2)]
    torch.distributed.barrier()
    if rank == 0:
        torch.save(gather(torch.tensor([1.0, 2.0]), groups[0]), f"{folder}/gathered.pt")
    torch.distributed.destroy_process_group()


def test_other_groups_are_not_waited_for(tmp_path):
    torch.multiprocessing.spawn(alone, (str(tmp_path),), nprocs=2)
    assert torch.load(tmp_path / "gathered.pt").tolist() == [1.0, 2.0]


class Checkpoints(FSDPEngineWithLMHead):
    """An engine without a model, whose checkpoints are empty."""

    def __init__(self):
        pass

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        self.saved = (local_path, global_step, max_ckpt_to_keep)

    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=True):
        self.loaded = (local_path, del_local_after_load)

    def get_data_parallel_group(self):
        return None

    def forward_backward_batch(self, data, loss_function, forward_only):
        return tu.get_non_tensor_data(data, "entropy_change_range", None)


class CheckpointedEngine(TokenWeightNormalizer, Checkpoints):
    pass


def test_the_running_range_outlives_a_checkpoint(one_rank, tmp_path):
    """A run that is stopped after two mini-batches and goes on gives the third the range of a run that isn't."""
    loss = partial(ppo_loss, config=actor_config(token_weight_normalizer="ema", token_weight_ema_decay=0.5))
    batches = [(0, 3), (3, 5), (5, 8)]
    whole, first, second = CheckpointedEngine(), CheckpointedEngine(), CheckpointedEngine()
    ranges = [whole.forward_backward_batch(mini_batch(*batch), loss, forward_only=False) for batch in batches]
    assert ranges[0] != ranges[1] != ranges[2]
    for batch in batches[:2]:
        first.forward_backward_batch(mini_batch(*batch), loss, forward_only=False)
    first.save_checkpoint(str(tmp_path), None, 7, max_ckpt_to_keep=1)
    assert first.saved == (str(tmp_path), 7, 1) and json.loads((tmp_path / RANGE_FILE).read_text())
    second.load_checkpoint(str(tmp_path), None, False)
    assert second.loaded == (str(tmp_path), False)
    assert second.forward_backward_batch(mini_batch(*batches[2]), loss, forward_only=False) == ranges[2]


def test_a_mini_batch_without_valid_tokens_is_no_part_of_the_running_range(one_rank, tmp_path):
    """Neither the first, whose zeros the next would be averaged with, nor a later one."""
    loss = partial(ppo_loss, config=actor_config(token_weight_normalizer="ema", token_weight_ema_decay=0.5))

    def empty():
        data = mini_batch(0, 3)
        data["response_mask"] = data["response_mask"] * 0
        return data

    engine, other = CheckpointedEngine(), CheckpointedEngine()
    assert engine.forward_backward_batch(empty(), loss, forward_only=False) == NOTHING_VALID
    engine.save_checkpoint(str(tmp_path))
    assert engine.running_range is None and not (tmp_path / RANGE_FILE).exists()
    first = other.forward_backward_batch(mini_batch(3, 5), loss, forward_only=False)
    assert engine.forward_backward_batch(mini_batch(3, 5), loss, forward_only=False) == first
    assert engine.forward_backward_batch(empty(), loss, forward_only=False) == first == engine.running_range


@pytest.mark.parametrize(
    "loss_mode, normalizer, forward_only, has_range",
    [
        ("entropy_control", "global", False, True),
        ("entropy_control", "global", True, False),
        ("entropy_control", "micro_batch", False, False),
        ("vanilla", "global", False, False),
    ],
)
def test_only_who_asks_for_a_range_gets_one(one_rank, tmp_path, loss_mode, normalizer, forward_only, has_range):
    engine = CheckpointedEngine()
    loss = partial(ppo_loss, config=actor_config(loss_mode, token_weight_normalizer=normalizer))
    found = engine.forward_backward_batch(mini_batch(0, 8), loss, forward_only=forward_only)
    assert (found is not None) is has_range
    engine.save_checkpoint(str(tmp_path))
    engine.load_checkpoint(str(tmp_path))
    assert engine.running_range is None and not (tmp_path / RANGE_FILE).exists()


def test_losses_of_other_workers_pass_through(one_rank):
    """Inference has no loss, a critic's has no policy loss."""
    for loss in (None, lambda model_output, data, dp_group: None, partial(ppo_loss, config=object())):
        assert CheckpointedEngine().forward_backward_batch(mini_batch(0, 8), loss, forward_only=False) is None
