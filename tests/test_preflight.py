# SPDX-License-Identifier: Apache-2.0
"""The checks before training: estimates by hand, what a failed check leads to, and its one line."""

import signal
import sys
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from configurations import resolved
from omegaconf import OmegaConf
from small_engine import make_engine, mini_batches
from transformers import AutoModelForCausalLM, Qwen2Config
from verl.steer.loss import ppo_loss
from verl.steer.preflight import dataset, disk, machine, main, memory, processes, ranks
from verl.steer.preflight.rows import GIB, Row, report, run_check
from verl.steer.requirements import check_and_complete, hardware
from verl.workers.config import FSDPActorConfig

ACTOR = "actor_rollout_ref.actor"


def parameters_of(vocabulary, hidden, layers, heads, key_heads, feed_forward):
    """Parameters of a Qwen2 whose output layer is not tied to its embedding, counted by hand."""
    key = hidden // heads * key_heads
    queries, keys_and_values, output = hidden * hidden + hidden, 2 * (hidden * key + key), hidden * hidden
    layer = queries + keys_and_values + output + 3 * hidden * feed_forward + 2 * hidden
    return 2 * vocabulary * hidden + layers * layer + hidden


@pytest.fixture
def configured(tmp_path):
    """A configuration whose model has these dimensions."""

    def build(shape, *overrides, method="grpo", tied=False):
        folder = tmp_path / ("tied" if tied else "model")
        vocabulary, hidden, layers, heads, key_heads, feed_forward = shape
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_heads, intermediate_size=feed_forward, tie_word_embeddings=tied,
            architectures=["Qwen2ForCausalLM"],
        ).save_pretrained(folder)  # fmt: skip
        return resolved(method, *overrides, f"actor_rollout_ref.model.path={folder}")

    return build


SMALL, QWEN_7B = (100, 8, 2, 2, 1, 16), (152_064, 3584, 28, 28, 4, 18_944)


def test_parameters_are_counted(configured):
    assert memory.model_of(configured(SMALL))[0] == parameters_of(*SMALL) == 2 * 800 + 2 * 608 + 8
    # the number that the model's page gives as 7.61 B
    assert memory.model_of(configured(QWEN_7B))[0] == parameters_of(*QWEN_7B) == 7_615_616_512


def test_memory_of_a_small_model_on_a_cpu(configured):
    """Two ranks in float32, no checkpointing; vLLM, which never sleeps there, has the weights and one GiB.

    For a token a layer saves 4 norms' tensors of 8, queries, keys and values, rotated queries and keys, and attention's
    output (3 * 8 + 3 * 4), 4 tensors of 16, all of 4 bytes, and two copies of 8 of 4 bytes. Micro-batches have 128 * 80
    and 32 * 80 tokens of 32 + 48. The embeddings, 1600 numbers, outweigh a layer's 612.
    """
    config = configured(SMALL, "hardware=cpu", "task=arithmetic", "trainer.n_gpus_per_node=2")
    parameters, layer = 2824, 612
    saved, shard, vllm = 4 * (32 + 36 + 64) + 64, 4 * parameters / 2, 4 * parameters + GIB
    gathered, reduced, logits = 4 * (1600 + 2 * layer), 8 * 1600, 400
    assert memory.phases(memory.model_of(config), config, 8 * GIB) == {
        "generation": 3 * GIB + vllm + 3 * shard,
        "log-probs": 3 * GIB + vllm + 3 * shard + gathered + 128 * 80 * (saved + logits),
        "update": 3 * GIB + vllm + 4 * shard + gathered + reduced + 32 * 80 * (2 * saved + logits),
    }


def test_memory_of_qwen_7b_on_8_gpus(configured):
    """Micro-batches of 8 * (1024 + 3072) tokens in bfloat16, with checkpointing; vLLM sleeps while the model trains."""
    config, tokens = configured(QWEN_7B), 8 * 4096
    parameters, embeddings = 7_615_616_512, 2 * 152_064 * 3584
    layer = (parameters - embeddings) / 28
    saved = 2 * (4 * 3584 + 3 * 3584 + 3 * 512 + 4 * 18_944) + 8 * 3584
    shard, gathered, reduced = 4 * parameters / 8, 2 * (embeddings + 2 * layer), 6 * embeddings
    expected = {
        "generation": 3 * GIB + 0.6 * 80 * GIB + 3 * shard,
        "log-probs": 3 * GIB + 3 * shard + gathered + tokens * (saved + 2 * 152_064),
        "update": 3 * GIB + 4 * shard + gathered + reduced + tokens * (saved + 2 * 3584 * 28 + 2 * 152_064),
    }
    assert memory.phases(memory.model_of(config), config, 80 * GIB) == pytest.approx(expected, rel=1e-12)
    assert 45 * GIB < expected["update"] < 55 * GIB


def test_with_lora_the_adapter_alone_has_gradients_and_moments(configured):
    """Rank 4, on two ranks in float32: 4 * (inputs + outputs) numbers for each of a layer's seven matrices."""
    cpu = ["hardware=cpu", "task=arithmetic", "trainer.n_gpus_per_node=2"]
    lora = ["actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora.merge=true"]
    config, model, whole_layer = configured(SMALL, *cpu, *lora), 2824, 612
    layer = 4 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16))
    adapter = 2 * layer
    assert memory.model_of(config)[:2] == (model + adapter, adapter)
    found = memory.phases(memory.model_of(config), config, 8 * GIB)
    saved, gathered = 4 * (32 + 36 + 64) + 64, 4 * (1600 + 2 * (whole_layer + layer))
    state = 4 * (model + adapter) / 2 + 3 * 4 * adapter / 2
    vllm = 4 * (model + adapter) + GIB
    assert found["update"] == 3 * GIB + vllm + state + gathered + 8 * layer + 32 * 80 * (2 * saved + 400)
    assert found["generation"] == 3 * GIB + vllm + state - 4 * adapter / 2
    assert disk.checkpoint_bytes(config) == 4 * (2 * (model + adapter) + 2 * adapter)


def test_memory_depends_on_what_is_offloaded(configured):
    """On one GPU parameters and moments wait elsewhere, until the update; with offload_policy they stay there."""

    def needed(*overrides):
        config = configured(QWEN_7B, "hardware=gpu1", *overrides)
        return memory.phases(memory.model_of(config), config, 80 * GIB)

    policy = f"{ACTOR}.fsdp_config.offload_policy=true"
    usual, offloaded = needed(), needed(policy, f"{ACTOR}.strategy=fsdp2")
    assert needed(policy) == usual  # FSDP1 ignores it
    assert usual["generation"] == 3 * GIB + 0.4 * 80 * GIB
    assert usual["update"] - offloaded["update"] == pytest.approx(16 * 7_615_616_512)
    separate = needed(f"{ACTOR}.fsdp_config.one_pass_reductions=false")
    assert separate["update"] - usual["update"] == pytest.approx(7 * 4 * 4096 * 2 * 152_064)


def test_memory_of_whole_parameters_and_gradients(configured):
    """Of all layers until the backward pass, and of gradients that are summed over micro-batches before ranks do."""
    parameters, fsdp = 7_615_616_512, f"{ACTOR}.fsdp_config"
    embeddings = 2 * 152_064 * 3584
    usual, no_sync = configured(QWEN_7B), f"{fsdp}.use_no_sync_for_gradient_accumulation=true"
    assert difference(configured(QWEN_7B, no_sync), usual) == {
        "generation": 0, "log-probs": 0, "update": 2 * parameters
    }  # fmt: skip
    fsdp2 = f"{ACTOR}.strategy=fsdp2"
    assert difference(configured(QWEN_7B, no_sync, fsdp2), configured(QWEN_7B, fsdp2))["update"] == 4 * parameters
    whole = 2 * (parameters - embeddings) * (1 - 2 / 28)
    found = difference(configured(QWEN_7B, f"{fsdp}.reshard_after_forward=false"), usual)
    assert found == pytest.approx({"generation": 0, "log-probs": whole, "update": whole})


def test_fsdp1_gathers_a_model_with_an_adapter_whole_for_vllm(configured):
    """In float32, beside vLLM's weights in bfloat16 on four devices and the shards of eight."""
    lora = [f"actor_rollout_ref.model.{key}" for key in ("lora_rank=8", "target_modules=all-linear")]
    config = configured(QWEN_7B, *lora)
    size = memory.model_of(config)
    state = (4 * size.parameters + 2 * 4 * size.trained) / 8
    expected = 3 * GIB + state + 4 * size.parameters + 2 * size.parameters / 4
    assert memory.phases(size, config, 80 * GIB)["weights to vLLM"] == pytest.approx(expected)
    for override in ("actor_rollout_ref.rollout.layered_summon=true", f"{ACTOR}.strategy=fsdp2"):
        assert "weights to vLLM" not in memory.phases(size, configured(QWEN_7B, *lora, override), 80 * GIB)


def difference(config, other):
    """What the phases of a configuration need beyond those of another one."""
    more, less = (memory.phases(memory.model_of(found), found, 80 * GIB) for found in (config, other))
    return {phase: amount - less.get(phase, 0.0) for phase, amount in more.items()}


def test_an_embedding_that_is_the_output_layer_too_counts_once(configured):
    """800 numbers less of 4 bytes: in vLLM's weights and in shards of a half, gathered whole, reduced with 8 bytes."""
    cpu = ["hardware=cpu", "task=arithmetic", "trainer.n_gpus_per_node=2"]
    assert difference(configured(SMALL, *cpu), configured(SMALL, *cpu, tied=True)) == {
        "generation": 800 * (4 + 3 * 2),
        "log-probs": 800 * (4 + 3 * 2 + 4),
        "update": 800 * (4 + 4 * 2 + 4 + 8),
    }


def test_shards_may_be_larger_than_those_of_all_devices(configured):
    """Of two of eight devices, which have weights and moments between updates and weights, gradients and moments in.

    More devices than there are share no more.
    """
    assert set(difference(configured(QWEN_7B, f"{ACTOR}.fsdp_config.fsdp_size=32"), configured(QWEN_7B)).values()) == {
        0
    }
    larger, bytes_more = f"{ACTOR}.fsdp_config.fsdp_size=2", 4 * 7_615_616_512 * (1 / 2 - 1 / 8)
    found = difference(configured(QWEN_7B, larger), configured(QWEN_7B))
    assert found == pytest.approx({"generation": 3 * bytes_more, "log-probs": 3 * bytes_more, "update": 4 * bytes_more})


def test_ranks_that_share_sequences_have_a_part_of_a_micro_batch_each(configured):
    """Two ranks with micro-batches of 8 as much as one with 4."""
    shared = configured(QWEN_7B, f"{ACTOR}.ulysses_sequence_parallel_size=2")
    sizes = (f"{ACTOR}.ppo_micro_batch_size_per_gpu", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu")
    halved = configured(QWEN_7B, *(f"{size}=4" for size in sizes))
    assert set(difference(shared, halved).values()) == {0.0}


def test_a_reference_model_is_a_shard_more_in_the_machines_memory(configured):
    """verl keeps it there, which on a CPU is the device; with LoRA it is the actor itself."""
    loss, reward = f"{ACTOR}.use_kl_loss=true", "algorithm.use_kl_in_reward=true"
    cpu = ["hardware=cpu", "task=arithmetic", "trainer.n_gpus_per_node=2"]
    for kl in (loss, reward):
        found = difference(configured(SMALL, *cpu, kl), configured(SMALL, *cpu))
        assert found == dict.fromkeys(("generation", "log-probs", "update"), 4 * 2824 / 2)
    for others in (["hardware=gpu1"], [*cpu, "actor_rollout_ref.model.lora_rank=8"]):
        assert set(difference(configured(SMALL, *others, loss), configured(SMALL, *others)).values()) == {0.0}


def test_a_critic_has_weights_gradients_and_moments_of_its_own(configured, tmp_path):
    """Its head has a single output; micro-batches of 2 * 4096 tokens in bfloat16, with checkpointing."""
    gae = [
        "algorithm.adv_estimator=gae", f"critic.model.path={tmp_path / 'model'}",
        "critic.ppo_micro_batch_size_per_gpu=2", "critic.fsdp.param_offload=true",
    ]  # fmt: skip
    embedding, layers = 152_064 * 3584, 28
    parameters = 7_615_616_512 - embedding + 3584 + 1
    assert memory.critic_of(configured(QWEN_7B, *gae))[0] == parameters
    plain, shard = configured(QWEN_7B), 4 * parameters / 8
    found = difference(configured(QWEN_7B, *gae), plain)
    update, waiting = found.pop("critic's update"), 2 * shard
    assert found == pytest.approx(dict.fromkeys(("generation", "log-probs", "update"), waiting))
    layer = (parameters - embedding) / layers
    saved = 2 * (4 * 3584 + 3 * 3584 + 3 * 512 + 4 * 18_944) + 8 * 3584
    passes = 2 * (embedding + 2 * layer) + 6 * embedding + 2 * 4096 * (saved + 2 * 3584 * layers)
    actor = 3 * 4 * 7_615_616_512 / 8
    assert update == pytest.approx(3 * GIB + actor + 4 * shard + passes)
    less = difference(configured(QWEN_7B, *gae, "critic.fsdp.optimizer_offload=true"), plain)
    assert less["generation"] == 0 and less["critic's update"] == update


def test_influence_through_the_parameters_keeps_a_direction_of_their_size(configured):
    """A copy of the trained weights in the update: the entropy's gradient, then the direction."""
    plain = configured(QWEN_7B)
    controlled, last_layer = (
        configured(QWEN_7B, f"{ACTOR}.policy_loss.influence_way={way}", method="influence_target")
        for way in ("null", "head")  # by default through the parameters
    )
    audit = ["trainer.entropy_audit.freq=5", "trainer.entropy_audit.influence=true"]
    more = {"generation": 0, "log-probs": 0, "update": 4 * 7_615_616_512 / 8}
    assert difference(controlled, plain) == difference(configured(QWEN_7B, *audit), plain) == pytest.approx(more)
    for none in (last_layer, configured(QWEN_7B, audit[1]), configured(QWEN_7B, method="pi_exact")):
        assert set(difference(none, plain).values()) == {0.0}


def test_a_best_checkpoint_is_saved_beside_vllm(configured):
    """The weights come back for it, and a layer or the embeddings are gathered in float32."""
    best = "trainer.save_best_only=true"
    waiting, none = configured(QWEN_7B, "hardware=gpu1", best), configured(QWEN_7B, "hardware=gpu1")
    needed = difference(waiting, none)["best checkpoint"]
    assert needed == pytest.approx(3 * GIB + 0.4 * 80 * GIB + 4 * 7_615_616_512 + 4 * 2 * 152_064 * 3584)
    named = configured(QWEN_7B, "hardware=gpu1", "trainer.best_metric_key=val-core/math_dapo/acc/mean@32")
    assert difference(named, none)["best checkpoint"] == needed


def test_too_little_memory_names_the_remedy(configured, monkeypatch):
    config = configured(QWEN_7B, "hardware=gpu1")
    monkeypatch.setattr(memory, "device_memory", lambda config: 80 * GIB)
    row = run_check("memory", memory.check_memory, config)
    assert not row.passed and "lower actor.ppo_micro_batch_size_per_gpu" in row.detail
    assert "gpu_memory_utilization" not in row.detail
    assert run_check("memory", memory.check_memory, configured(QWEN_7B)).passed


def test_long_responses_fit_in_micro_batches_of_tokens(configured, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda config: 80 * GIB)
    long = "data.max_response_length=20480"
    row = run_check("memory", memory.check_memory, configured(QWEN_7B, long))
    assert not row.passed and "set hardware=gpu8_long" in row.detail
    assert run_check("memory", memory.check_memory, configured(QWEN_7B, long, "hardware=gpu8_long")).passed


def test_the_entropy_of_a_nucleus_has_a_gradient_of_its_own(configured):
    """Two more tensors of a micro-batch's logits, in bfloat16."""
    grpo, siren = (configured(QWEN_7B, method=method) for method in ("grpo", "siren"))
    size = memory.model_of(grpo)
    plain, with_nucleus = (memory.phases(size, config, 80 * GIB) for config in (grpo, siren))
    tokens = 8 * (1024 + 3072)
    assert with_nucleus["update"] - plain["update"] == 2 * 2 * tokens * size.model.vocab_size
    assert with_nucleus["log-probs"] == plain["log-probs"]


@pytest.mark.parametrize(
    "overrides, steps, expected",
    [
        ([], 25, 1),  # save_after=80 is beyond the end, so the last step alone
        (["trainer.save_after=0"], 25, 3),  # 10, 20 and the last
        (["trainer.save_after=15"], 25, 2),
        (["trainer.save_after=0", "trainer.max_actor_ckpt_to_keep=1"], 25, 2),  # the next is written beside it
        (["trainer.save_freq=-1"], 25, 0),
        (["trainer.val_only=true"], 25, 0),
        (["trainer.save_best_only=true", "trainer.test_freq=5", "trainer.save_after=10"], 25, 4),  # 10, 15, 20, 25
        (["trainer.save_best_only=true", "trainer.delete_old_best_checkpoint=true"], 100, 2),
        (["trainer.best_metric_key=a", "trainer.save_after=20"], 25, 2 + 6),
        (["trainer.best_metric_key=a", "trainer.save_after=20", "trainer.max_actor_ckpt_to_keep=1"], 25, 3),
        (["trainer.save_best_only=true", "trainer.save_after=0", "trainer.max_actor_ckpt_to_keep=2"], 25, 4),
    ],
)
def test_most_checkpoints_on_disk(overrides, steps, expected):
    assert disk.most_checkpoints(resolved("grpo", *overrides).trainer, steps) == expected


@pytest.fixture
def data_of(configured, tmp_path, model_folder):
    """A configuration of the laptop task with a training file of these rows, and the tiny model."""

    def build(rows, *overrides):
        pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
        return resolved(
            "grpo", "hardware=cpu", "task=arithmetic", f"data.train_files={tmp_path / 'train.parquet'}",
            f"actor_rollout_ref.model.path={model_folder}", f"trainer.default_local_dir={tmp_path / 'out/run'}",
            *overrides,
        )  # fmt: skip

    return build


def rows_of(*prompts, **more):
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return {
        "prompt": messages,
        "data_source": ["math500"] * len(prompts),
        "reward_model": [{"ground_truth": "2"}] * len(prompts),
    } | more


def test_disk_counts_what_the_run_still_writes(data_of, tmp_path, monkeypatch):
    """64 rows are 4 steps of 16 in each of 2 epochs: 8 checkpoints of 4 numbers of 4 bytes for each parameter."""
    config = data_of(rows_of(*["1+2"] * 70), "trainer.total_epochs=2", "trainer.save_freq=1")
    parameters = memory.model_of(config)[0]
    free = 8 * 16 * parameters
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda place: SimpleNamespace(free=free if place == tmp_path else 0))
    assert disk.check_disk(config).startswith("8 checkpoints")
    free -= 1
    row = run_check("disk", disk.check_disk, config)
    assert not row.passed and "set trainer.max_actor_ckpt_to_keep=2" in row.detail and str(tmp_path) in row.detail
    for step in range(1, 3):
        (tmp_path / f"out/run/global_step_{step}").mkdir(parents=True)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    assert disk.check_disk(config).startswith("6 checkpoints")
    # the critic's weights and moments, and none for Hugging Face
    gae = ["algorithm.adv_estimator=gae", f"critic.model.path={config.actor_rollout_ref.model.path}"]
    config = data_of(rows_of("1+2"), *gae)
    assert disk.checkpoint_bytes(config) == 16 * parameters + 12 * memory.critic_of(config)[0]


def test_steps_where_the_rows_are_not_counted(data_of):
    named = ["data.train_files=hdfs://cluster/train.parquet", "trainer.total_epochs=2"]
    config = data_of(rows_of("1+2"), *named, "trainer.total_training_steps=7")
    assert disk.training_steps(config) == 7
    config = data_of(rows_of("1+2"), *named, "trainer.total_training_steps=null")
    with pytest.raises(ValueError, match=r"^trainer\.total_training_steps=null: expected a number"):
        disk.training_steps(config)


def test_checkpoints_are_as_large_as_estimated(model_folder, tmp_path, one_rank):
    """After an update, which makes the moments; pickles and the tokenizer add little.

    They don't name this fork's attention, with which nobody else could load them.
    """
    engine = make_engine(model_folder, packed=True)
    engine.checkpoint_manager.checkpoint_save_contents = ["model", "optimizer", "extra", "hf_model"]
    actor = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=2)
    with engine.train_mode():
        engine.train_batch(mini_batches(packed=True)[0], partial(ppo_loss, config=actor))
    engine.save_checkpoint(str(tmp_path / "actor"))
    size = sum(
        file.stat().st_size for file in (tmp_path / "actor").rglob("*") if file.suffix in (".pt", ".safetensors")
    )
    assert "packed_sdpa" not in (tmp_path / "actor/huggingface/config.json").read_text()
    parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    assert 1.0 < size / (parameters * 4 * 4) < 1.1  # weights, two moments, exported weights


@pytest.mark.parametrize("missing", ["prompt", "data_source", "reward_model"])
def test_a_missing_column_is_named(data_of, missing):
    rows = rows_of("1+2")
    del rows[missing]
    config = data_of(rows, "data.train_batch_size=1")
    row = run_check("training data", dataset.check_files, config, "train_files")
    assert not row.passed and f"no column {missing}:" in row.detail and "train.parquet" in row.detail


def test_lengths_of_prompts(data_of):
    """The chat template of the tiny model adds three tokens to a token for each character."""
    config = data_of(rows_of("1+2", "1+2+3", *["1+2+3+4"] * 5), "data.train_batch_size=7")
    assert dataset.check_files(config, "train_files") == "train.parquet: 7 rows, prompts of 6 to 10 tokens (limit 32)"
    for limit, passes in ((9, True), (5, False), (10, True)):
        config = data_of(rows_of("1+2", "1+2+3+4"), f"data.max_prompt_length={limit}", "data.train_batch_size=2")
        row = run_check("training data", dataset.check_files, config, "train_files")
        assert row.passed == passes and ("raise data.max_prompt_length" in row.detail) != passes


def test_fewer_rows_than_a_step_takes_are_no_data(data_of):
    row = run_check("training data", dataset.check_files, data_of(rows_of("1+2")), "train_files")
    assert not row.passed and row.detail.startswith("data.train_batch_size=16: expected at most 1, the rows of data.tr")


def test_patterns_and_files_of_other_machines(data_of, tmp_path):
    rows = rows_of(*["1+2"] * 40)
    config = data_of(rows, f"data.train_files=[{tmp_path}/tr*.parquet,hdfs://cluster/more.parquet]")
    assert dataset.check_files(config, "train_files") == (
        "train.parquet: 40 rows, prompts of 6 to 6 tokens (limit 32); "
        "hdfs://cluster/more.parquet: not read, since it is no parquet file of this machine"
    )
    config = data_of(rows, f"data.train_files={tmp_path}/tr*.parquet", "trainer.total_epochs=1")
    assert disk.training_steps(config) == 2


def test_a_missing_file_is_named(tmp_path, model_folder):
    config = resolved("grpo", f"data.val_files={tmp_path}/none.parquet", f"actor_rollout_ref.model.path={model_folder}")
    row = run_check("validation data", dataset.check_files, config, "val_files")
    assert row.detail.startswith(f"data.val_files: no file {tmp_path}/none.parquet: expected one")


NVIDIA_SMI = """#!/bin/sh
echo "NVIDIA H100 80GB HBM3, 580.1, 81559, 4"
echo "NVIDIA H100 80GB HBM3, 580.1, 81000, $USED"
"""


@pytest.mark.parametrize(
    "wanted, used, cuda, problems",
    [
        (2, 4, True, []),
        (1, 1024, True, []),
        (8, 4, True, ["2 of 8 GPUs: set trainer.n_gpus_per_node=2"]),
        (8, 1025, False, ["cannot use driver 580.1", "2 of 8 GPUs", "memory in use on GPU 1"]),
    ],
)
def test_gpus(wanted, used, cuda, problems, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("USED", str(used))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config = resolved("grpo", f"trainer.n_gpus_per_node={wanted}")
    row = run_check("GPUs", machine.check_gpus, config)
    assert row.passed == (not problems) and all(problem in row.detail for problem in problems)
    assert machine.device_memory(config) == 81000 * 2**20


def test_a_machine_without_a_driver_is_told_about_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    row = run_check("GPUs", machine.check_gpus, resolved("grpo"))
    assert not row.passed and "--cpu" in row.detail


def completed(monkeypatch, installed, *overrides):
    """A GPU's configuration after the checks, on whatever platform this is."""
    monkeypatch.setattr(hardware, "get_platform", lambda: SimpleNamespace(device_name="cuda"))
    monkeypatch.setattr(hardware, "find_spec", lambda name: installed or None)
    config = resolved("grpo", "ray_kwargs.ray_init.num_cpus=64", "+ray_kwargs.ray_init.num_gpus=8", *overrides)
    check_and_complete(config)
    return config.actor_rollout_ref.model.override_config.get("attn_implementation")


def test_torchs_attention_takes_the_place_of_flash_attn(monkeypatch):
    warned = []
    monkeypatch.setattr(hardware.logger, "warning", lambda *arguments: warned.append(arguments))
    name = "+actor_rollout_ref.model.override_config.attn_implementation"
    assert completed(monkeypatch, True) is None and not warned
    assert completed(monkeypatch, False) == "packed_sdpa" and "flash-attn is not installed" in warned[0][0]
    assert completed(monkeypatch, False, "actor_rollout_ref.model.use_remove_padding=false") == "sdpa"
    assert completed(monkeypatch, False, f"{name}=eager") == "eager"
    with pytest.raises(ValueError, match="attn_implementation=flash_attention_2: expected packed_sdpa"):
        completed(monkeypatch, False, f"{name}=flash_attention_2")
    with pytest.raises(ValueError, match="ulysses_sequence_parallel_size=2: expected 1 where flash-attn"):
        completed(monkeypatch, False, f"{ACTOR}.ulysses_sequence_parallel_size=2")
    ulysses = f"{ACTOR}.ulysses_sequence_parallel_size=2"
    assert completed(monkeypatch, True, ulysses) is None
    assert completed(monkeypatch, True, ulysses, f"{name}=flash_attention_2") == "flash_attention_2"
    assert completed(monkeypatch, True, f"{name}=sdpa") == "sdpa"
    with pytest.raises(ValueError, match="attn_implementation=sdpa: expected flash_attention_2 with actor.ulysses_seq"):
        completed(monkeypatch, True, ulysses, f"{name}=sdpa")


def test_a_broken_flash_attn_is_reported(monkeypatch):
    config = resolved("grpo")
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(__version__="2.8.3"))
    assert machine.check_attention(config) == "flash-attn 2.8.3"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    row = run_check("attention", machine.check_attention, config)
    assert not row.passed and "uninstall it" in row.detail


def fail(error):
    raise error


def test_one_failed_check_hides_no_other_and_ends_in_one_line(capsys):
    checks = {
        "first": lambda: "fine",
        "second": lambda: fail(ValueError("a key=1: set it to 2\nand more")),
        "third": lambda: fail(RuntimeError()),
        "fourth": lambda: "fine too",
    }
    rows = [run_check(name, check) for name, check in checks.items()]
    assert [row.passed for row in rows] == [True, False, False, True]
    assert report(rows) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "not ready: second: a key=1: set it to 2 (1 more in the table)"
    assert [name for name in checks if any(name in line for line in printed[:-1])] == list(checks)
    assert report(rows[:2]) == 1 and capsys.readouterr().out.endswith("not ready: second: a key=1: set it to 2\n")
    assert report(rows[::3]) == 0 and capsys.readouterr().out.endswith("\nready\n")


def test_the_exit_status_is_that_of_the_checks(monkeypatch, tmp_path):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr(main, "checks_in_processes", lambda *arguments: [])
    for check, status in ((lambda config: "fine", 0), (lambda config: fail(ValueError("bad")), 1)):
        monkeypatch.setattr(main, "CHECKS", {"only": check})
        with pytest.raises(SystemExit) as stop:
            main.main.__wrapped__(resolved("grpo"))
        assert stop.value.code == status


def test_vllm_does_not_fork(monkeypatch, tmp_path):
    """CUDA does not start in a process forked after verl's import; the run's variables reach all processes."""
    given = {}

    def record(folder, group, names, ranks, command, seconds, **variables):
        given[group] = variables
        return []

    monkeypatch.setattr(main, "run_group", record)
    config = resolved("grpo", "+ray_kwargs.ray_init.runtime_env.env_vars={SOME: a, VLLM_WORKER_MULTIPROC_METHOD: fork}")
    main.checks_in_processes(config, tmp_path, 0)
    gpu8s = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    assert given["vllm"] == {"SOME": "a", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"} | gpu8s
    assert given["ranks"]["SOME"] == "a"


def test_the_engine_of_the_check_has_the_runs_options(monkeypatch, tmp_path):
    """`logprobs_mode` too: with another one vLLM uses another sampler."""
    from verl.steer.preflight import generate

    given = {}

    def engine(model, **options):
        given.update(options, model=model)
        fail(RuntimeError("made"))

    monkeypatch.setattr(generate, "LLM", engine)
    with pytest.raises(RuntimeError, match="made"):
        generate.generate(tmp_path, resolved("grpo", "hardware=cpu", "task=arithmetic"))
    assert given["logprobs_mode"] == "processed_logprobs" and given["dtype"] == "float32"
    assert given["max_model_len"] == 96 and given["num_gpu_blocks_override"] == 512 and given["tokenizer"] is None


def test_rows_of_several_ranks(tmp_path):
    """A failure explains more than a rank that waited for it in vain, and missing rows tell how the process ended."""
    script = (
        "import sys, pathlib; from verl.steer.preflight.processes import write_row, Row\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for rank in range(3): write_row(folder, 'ranks', rank, Row('both', True, f'fine {rank}'))\n"
        "write_row(folder, 'ranks', 2, Row('sum', False, 'no link'))\n"
        "print('a line', flush=True); sys.exit(3)\n"
    )
    (tmp_path / "ranks_1.jsonl").write_text('["sum", true, "of an earlier call"]\n')
    command = [sys.executable, "-c", script, str(tmp_path)]
    rows = processes.run_group(tmp_path, "ranks", ("both", "sum", "last"), 3, command, 600, SOME="1")
    log = tmp_path / "ranks.log"
    assert rows == [
        Row("both", True, "fine 0"),
        Row("sum", False, "rank 2: no link"),
        Row("last", False, f"rank 0: ended with status 3: see {log}"),
    ]
    assert "a line" in log.read_text()


@pytest.mark.parametrize("session", ["", "setsid"])
def test_a_process_out_of_time_is_ended_with_its_children(tmp_path, session):
    """Also with one in a session of its own, as torchrun's workers are."""
    script = f"{session} sleep 600 & echo $! > {tmp_path}/child; wait"
    (row,) = processes.run_group(tmp_path, "vllm", ("vLLM",), 1, ["bash", "-c", script], 10)
    assert not row.passed and "not done after 10 s" in row.detail
    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(int((tmp_path / "child").read_text()))
        psutil.wait_procs([child], timeout=60)  # the kernel takes a moment
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def rank(tmp_path, model_folder, monkeypatch):
    """A rank without an engine."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "config.yaml").write_text("actor_rollout_ref: {model: {lora_adapter_path: null}}\n")
    (tmp_path / "tokens.json").write_text('{"prompt": [1], "responses": [[2, 3], [4]], "log_probs": [[-1, -2], [-3]]}')
    return ranks.Rank(tmp_path)


def test_log_probs_of_other_weights_are_noticed(rank, monkeypatch):
    for found, passes in (([-1, -2, -3.0001], True), ([-1, -2, -3.1], False), ([-1, -2, float("nan")], False)):
        monkeypatch.setattr(rank, "engine_log_probs", lambda *tokens, found=found: torch.tensor(found))
        row = run_check("log-probs", rank.log_probs)
        assert row.passed == passes and "on 3 tokens" in row.detail
    (rank.folder / "tokens.json").unlink()
    assert "repair vLLM first" in run_check("log-probs", rank.log_probs).detail
    rank.config.actor_rollout_ref.model.lora_adapter_path = "/an/adapter"
    row = run_check("log-probs", rank.log_probs)
    assert row.passed and row.detail == "not compared: vLLM sampled without model.lora_adapter_path=/an/adapter"


@pytest.mark.parametrize("name, factor", [("log_prob", 1.001), ("entropy", float("nan")), ("log_prob", 1.0)])
def test_wrong_kernels_are_noticed(rank, monkeypatch, name, factor):
    right = ranks.vocab_reductions

    def wrong(*arguments):
        found = right(*arguments)
        return found._replace(**{name: getattr(found, name) * factor})

    monkeypatch.setattr(ranks, "vocab_reductions", wrong)
    row = run_check("kernels", rank.kernels)
    assert row.passed == (factor == 1.0) and ("one_pass_reductions=false" in row.detail) != row.passed


def test_the_engine_of_a_rank(data_of, model_folder, tmp_path, one_rank, monkeypatch):
    """Log-probs of packed responses are those of each alone, and weights that are not read back are noticed."""
    config = data_of(rows_of("1+2"))
    check_and_complete(config)
    OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    rank = ranks.Rank(tmp_path)
    prompt, responses = [5, 6], [[7, 8, 9], [10]]
    model, expected = AutoModelForCausalLM.from_pretrained(model_folder), []
    for response in responses:
        log_pi = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected += [log_pi[1 + index, token].item() for index, token in enumerate(response)]
    torch.testing.assert_close(rank.engine_log_probs(prompt, responses), torch.tensor(expected))
    row = run_check("checkpoint", rank.checkpoint)
    assert row.passed and row.detail.endswith(f"and read back, in {tmp_path / 'out/run'}")
    monkeypatch.setattr(rank.engine, "load_checkpoint", lambda place: None)
    row = run_check("checkpoint", rank.checkpoint)
    assert not row.passed and "read other weights than were written" in row.detail


def test_help(command, root):
    result = command("bash", root / "run/preflight.sh", "-h", cwd="/")
    assert result.returncode == 0 and result.stdout.startswith("Checks this machine for a run")
    assert "bash run/preflight.sh [--cpu] [Hydra overrides" in result.stdout and "set -euo" not in result.stdout


def test_a_cancelled_job_ends_the_checks_as_ctrl_c_does(monkeypatch, tmp_path):
    """By an exception, which ends the processes of `run_group`."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def cancelled(config, folder, end):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr(main, "CHECKS", {})
    monkeypatch.setattr(main, "checks_in_processes", cancelled)
    # Else the signal would end the tests.
    signal.signal(signal.SIGTERM, lambda number, _: None)
    try:
        with pytest.raises(SystemExit) as end:
            main.main.__wrapped__(None)
        assert end.value.code == 128 + signal.SIGTERM
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
