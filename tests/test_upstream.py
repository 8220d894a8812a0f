# SPDX-License-Identifier: Apache-2.0
"""What this fork leans on in verl: an upgrade of verl that breaks it fails here, by name."""

import importlib
import inspect
import math
import sys

import numpy as np
import plain_step
import pytest
import torch
from configurations import ACTOR, resolved
from losses import micro_batch
from verl import DataProto
from verl.steer import worker
from verl.steer.requirements.verl_values import KL_ESTIMATES
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import BASE_LOSSES, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.v1 import trainer_base, utils

# module, attribute, parameters that the fork passes or overrides (None: not a function, presence is enough)
RELIED_ON = [
    ("verl.trainer.ppo.core_algos", "register_policy_loss", ["name"]),
    (
        "verl.trainer.ppo.core_algos",
        "compute_policy_loss_vanilla",
        ["old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights"],
    ),
    ("verl.trainer.ppo.core_algos", "register_adv_est", ["name_or_enum"]),
    (
        "verl.trainer.ppo.core_algos",
        "compute_grpo_outcome_advantage",
        ["token_level_rewards", "response_mask", "index", "epsilon", "norm_adv_by_std_in_grpo", "config"],
    ),
    (
        "verl.trainer.ppo.core_algos",
        "agg_loss",
        [
            "loss_mat",
            "loss_mask",
            "loss_agg_mode",
            "dp_size",
            "batch_num_tokens",
            "global_batch_size",
            "loss_scale_factor",
        ],
    ),  # fmt: skip
    ("verl.utils", "as_torch_index", ["index", "device"]),
    ("verl.utils.torch_functional", "masked_mean", ["values", "mask", "axis"]),
    ("verl.utils.tensordict_utils", "get_non_tensor_data", ["data", "key", "default"]),
    ("verl.workers.utils.losses", "ppo_loss", ["config", "model_output", "data", "dp_group"]),
    ("verl.workers.utils.losses", "get_policy_loss_fn", ["name"]),
    ("verl.workers.utils.padding", "no_padding_2_padding", ["tensor", "data"]),
    ("verl.utils.distributed", "initialize_global_process_group_ray", ["timeout_second", "backend"]),
    ("verl.utils.device", "get_device_name", []),
    ("verl.utils.config", "omega_conf_to_dataclass", ["config", "dataclass_type"]),
    ("verl.plugin.platform", "PlatformRegistry", None),
    ("verl.workers.engine.base", "EngineRegistry", None),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead", None),
    (
        "verl.workers.engine.fsdp.transformer_impl",
        "FSDPEngineWithLMHead.prepare_model_outputs",
        ["self", "output", "output_args", "micro_batch", "logits_processor_func"],
    ),
    (
        "verl.workers.engine.fsdp.transformer_impl",
        "FSDPEngine.forward_backward_batch",
        ["self", "data", "loss_function", "forward_only"],
    ),
    (
        "verl.workers.engine.fsdp.transformer_impl",
        "FSDPEngine.save_checkpoint",
        ["self", "local_path", "hdfs_path", "global_step", "max_ckpt_to_keep", "kwargs"],
    ),
    (
        "verl.workers.engine.fsdp.transformer_impl",
        "FSDPEngine.load_checkpoint",
        ["self", "local_path", "hdfs_path", "del_local_after_load", "kwargs"],
    ),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.get_data_parallel_group", ["self"]),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.get_data_parallel_rank", ["self"]),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.get_data_parallel_size", ["self"]),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.is_mp_src_rank_with_outputs", ["self"]),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.eval_mode", ["self", "kwargs"]),
    ("verl.workers.engine.base", "BaseEngine.train_batch", ["self", "data", "loss_function"]),
    ("verl.workers.engine.base", "BaseEngine.infer_batch", ["self", "data", "loss_function"]),
    (
        "verl.workers.engine.utils",
        "prepare_micro_batches",
        [
            "data",
            "dp_group",
            "num_batches_divided_by",
            "same_micro_num_in_dp",
            "min_num_micro_batch",
            "use_dynamic_bsz_balance",
        ],
    ),
    ("verl.workers.utils.padding", "response_from_nested", ["tensor", "response_mask"]),
    ("verl.utils.metric", "Metric.from_dict", ["data", "aggregation"]),
    ("verl.workers.config", "PolicyLossConfig", None),
    ("verl.trainer.main_ppo", "TaskRunnerV1", None),
    ("verl.trainer.main_ppo", "run_ppo", ["config", "task_runner_class"]),
    ("verl.trainer.ppo.v1.trainer_base", "register_trainer", ["name"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer.fit", ["self", "agent_loop_manager"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._build_replay_buffer", ["self"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_old_log_prob", ["self", "batch", "metrics"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage", ["self", "batch", "metrics"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._update_actor", ["self", "batch", "metrics"]),
    (
        "verl.trainer.ppo.v1.trainer_base",
        "PPOTrainer._maybe_log_val_generations",
        ["self", "inputs", "outputs", "scores"],
    ),
    ("verl.trainer.ppo.v1.agent_loop_tq", "AgentLoopManagerTQ.generate_sequences", ["self", "prompts"]),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopBase.ct_build_initial_tokens", None),
    ("verl.experimental.reward_loop.reward_loop", "RewardLoopWorker.compute_score_batch", ["self", "data"]),
    ("verl.workers.rollout.llm_server", "LLMServerManager.get_client", ["self", "client_cls", "kwargs"]),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer.get_llm_client", ["self"]),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopManager._init_agent_loop_workers", ["self"]),
    ("verl.workers.rollout.replica", "RolloutReplicaRegistry.register", ["name", "loader"]),
]


@pytest.mark.parametrize("module, name, parameters", RELIED_ON, ids=lambda value: str(value) if value else "")
def test_upstream_has_what_the_fork_relies_on(module, name, parameters):
    found = importlib.import_module(module)
    found = getattr(found, "_upstream", found)
    for part in name.split("."):
        assert hasattr(found, part), f"{module}.{name} is gone from the installed verl"
        found = getattr(found, part)
    if parameters is not None:
        assert list(inspect.signature(found).parameters) == parameters, f"{module}.{name} takes other parameters"


@pytest.mark.parametrize("name", BASE_LOSSES)
def test_base_losses_take_what_steer_passes(name):
    parameters = list(inspect.signature(get_policy_loss_fn(name)).parameters)
    assert parameters == list(inspect.signature(get_policy_loss_fn("vanilla")).parameters)


def test_the_trainer_passes_advantage_estimators_what_they_take(monkeypatch):
    """Rewards, mask, prompt and `algorithm`, and nothing that they would refuse; the entropy is in its metrics."""
    seen = {}

    def estimator(**arguments):
        seen.update(arguments)
        return arguments["token_level_rewards"], arguments["token_level_rewards"]

    monkeypatch.setitem(core_algos.ADV_ESTIMATOR_REGISTRY, "probe", estimator)
    tensors = {"token_level_rewards": torch.ones(2, 3), "response_mask": torch.ones(2, 3)}
    data = DataProto.from_dict(tensors, non_tensors={"uid": np.array(["a", "a"], dtype=object)})
    utils.compute_advantage_for_multi_trajectories(data, ["a_0_0", "a_1_0"], "probe", config={"positive_weight": 0.3})
    assert seen.keys() == {"token_level_rewards", "response_mask", "config", "index"}
    assert seen["config"] == {"positive_weight": 0.3} and list(seen["index"]) == ["a", "a"]
    source = inspect.getsource(trainer_base.PPOTrainer)
    assert '"actor/entropy": entropy_agg' in source and "calculate_sum_pi_squared" not in source


def test_main_of_upstream_is_reachable_without_hydra():
    main = importlib.import_module("verl.trainer.main_ppo").main
    assert list(inspect.signature(main.__wrapped__).parameters) == ["config"]


def test_worker_names_that_need_vllm():
    pytest.importorskip("vllm")
    server = importlib.import_module("verl.workers.rollout.vllm_rollout.vllm_async_server")
    assert {"prompt_ids", "sampling_params", "request_id"} <= set(
        inspect.signature(server.vLLMHttpServer.generate).parameters
    )
    assert "server_class" in inspect.getsource(server.vLLMReplica.__init__)
    extension = importlib.import_module("verl.workers.rollout.vllm_rollout.utils").vLLMColocateWorkerExtension
    parameters = list(inspect.signature(extension.update_weights_from_ipc).parameters)
    assert parameters == ["self", "peft_config", "base_sync_done", "use_shm"]


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_every_trainer_of_verl_starts_this_forks_workers(monkeypatch, mode):
    """By verl's own choice of workers; one of `separate_async` alone keeps the weights of several steps."""
    ours = worker.SteerDetachActorWorker if mode == "separate_async" else worker.SteerActorRolloutRefWorker
    monkeypatch.setattr(worker, "TRAINER_REGISTRY", dict(worker.TRAINER_REGISTRY))
    worker.give_steer_workers(mode)
    trainer = object.__new__(worker.TRAINER_REGISTRY[mode])
    trainer.config = resolved("grpo", "hardware=cpu", "algorithm.adv_estimator=gae", f"{ACTOR}.use_kl_loss=true")
    trainer._init_resource_pool_mgr()
    found = {role: actor.__ray_metadata__.modified_class for role, actor in trainer.role_worker_mapping.items()}
    assert issubclass(found.pop(worker.Role.Critic), worker.SteerTrainingWorker) and found
    assert all(issubclass(actor, ours) for actor in found.values())
    assert all(hasattr(actor, "save_model_to_cpu") == (mode == "separate_async") for actor in found.values())
    assert ours.actor_worker_cls is ours.ref_worker_cls is worker.SteerTrainingWorker


def test_a_step_without_the_forks_options_is_plain_verls(command, tmp_path):
    """The loss of one micro-batch and the resolved configuration, here and where the plugin is switched off."""
    batch = tmp_path / "batch.pt"
    torch.save(micro_batch(), batch)
    result = command(sys.executable, plain_step.__file__, batch, cwd=tmp_path, VERL_USE_EXTERNAL_PLUGINS="none")
    assert result.returncode == 0, result.stderr
    assert result.stdout == plain_step.outcome(batch) and "loss_mode: vanilla" in result.stdout


@pytest.mark.parametrize("name", [name + gradient for name in KL_ESTIMATES for gradient in ("", "+")])
def test_verl_knows_the_estimates_of_a_kl_divergence(name):
    """It has their names inside a function only."""
    estimate = kl_penalty(torch.tensor([-1.0]), torch.tensor([-1.5]), name)
    # ln π - ln π_ref = 0.5: k1, its magnitude, k2 or k3.
    assert estimate.item() in [pytest.approx(value) for value in (0.5, 0.125, math.exp(-0.5) - 0.5)]
