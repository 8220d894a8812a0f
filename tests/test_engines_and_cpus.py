# SPDX-License-Identifier: Apache-2.0
"""verl's other engines serve an option of this fork or refuse it, and a run that Ray can't place is refused."""

import re
from types import SimpleNamespace

import pytest
import torch
from configurations import ACTOR, METHODS, POLICY_LOSS, resolved
from transfer_queue.controller import TransferQueueController
from transfer_queue.storage.simple_storage import SimpleStorageUnit
from verl.experimental.reward_loop.reward_manager.remote import RewardComputeWorker
from verl.steer import ray_resources
from verl.steer.cpu.platform import PlatformCPU
from verl.steer.methods.registry import fields_needed
from verl.steer.requirements import check_and_complete, hardware
from verl.steer.rollout.checks import check_servers
from verl.trainer.main_ppo import TaskRunnerV1
from verl.utils.config import omega_conf_to_dataclass, validate_config

ENGINES = ("megatron", "veomni", "torchtitan")
#: What verl's engine returns or keeps, as `LossInputs` names it; the other fields are those of this fork's engine.
SERVED_BY_VERL = {"entropys", "current_entropys", "entropy_coeff"}


@pytest.fixture(autouse=True)
def gpu_machine(monkeypatch):
    """verl's platform is CUDA with flash-attn, and Ray would count 8 GPUs and 30 CPUs; `monkeypatch` sets others."""
    monkeypatch.setattr(hardware, "get_platform", lambda: SimpleNamespace(device_name="cuda"))
    monkeypatch.setattr(hardware, "find_spec", lambda _: True)
    monkeypatch.setattr(ray_resources, "get_num_cpus", lambda _: 30)
    monkeypatch.setattr(ray_resources.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(ray_resources.services, "canonicalize_bootstrap_address", lambda _: None)


def checked(name, *overrides):
    config = resolved(name, *overrides)
    check_and_complete(config)
    return config


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_served_or_refused(method, engine):
    """Served where the loss reads no more than verl's engine returns; the actor's configuration then is verl's own."""
    loss = omega_conf_to_dataclass(resolved(method).actor_rollout_ref.actor.policy_loss)
    if fields_needed(loss) <= SERVED_BY_VERL:
        config = checked(method, f"model_engine={engine}")
        validate_config(config, use_reference_policy=True, use_critic=False)
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        assert actor.strategy == actor.engine.strategy == engine and actor.policy_loss == loss
        assert actor.calculate_entropy == ("current_entropys" in fields_needed(loss))
    else:
        named = method.startswith("influence")  # with FSDP2 in its configuration
        message = f"fsdp2: expected {engine} with" if named else f"{engine}: expected one of fsdp, fsdp2:"
        with pytest.raises(ValueError, match=rf"^actor.strategy={message} .*\Z"):
            checked(method, f"model_engine={engine}")


def test_some_methods_are_served_and_some_are_refused():
    refused = {
        method
        for method in METHODS
        if fields_needed(omega_conf_to_dataclass(resolved(method).actor_rollout_ref.actor.policy_loss)) - SERVED_BY_VERL
    }
    controls = {"influence_band", "influence_exp", "influence_target", "pi_exact", "pi_released"}
    assert refused == {"clip_v", "opefo", "siren", "steer_ema", "steer_exact", "steer_global"} | controls


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "overrides, message",
    [
        (["hardware=cpu", "trainer.device=cuda"], "actor.strategy=fsdp2: expected {0} with model_engine={0}"),
        (["hardware=gpu1"], "actor.fsdp_config: expected none with model_engine={0}, which ignores its keys param_off"),
        ([f"+{ACTOR}.fsdp_config.one_pass_reductions=true"], "actor.fsdp_config: expected none with model_engine={0}"),
        (
            ["+actor_rollout_ref.ref.fsdp_config.one_pass_reductions=true"],
            "ref.fsdp_config: expected none with model_engine={0}, which ignores its keys one_pass_reductions; the",
        ),
        ([f"{ACTOR}.strategy=fsdp"], "actor.strategy=fsdp: expected {0} with model_engine={0}"),
        (["trainer.entropy_audit.freq=2"], "actor.strategy={0}: expected fsdp or fsdp2 with trainer.entropy_audit"),
        ([f"{POLICY_LOSS}.token_weight_normalizer=ema"], "actor.strategy={0}: expected one of fsdp, fsdp2: token_weig"),
        ([f"{POLICY_LOSS}.entropy_change_estimator=exact"], "actor.strategy={0}: expected one of fsdp, fsdp2: entropy"),
    ],
)
def test_options_of_this_forks_engine_are_refused(engine, overrides, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(engine))}"):
        checked("steer_exp", f"model_engine={engine}", *overrides)


@pytest.mark.parametrize("engine", ENGINES)
def test_another_engines_strategy_needs_that_engine(engine):
    with pytest.raises(ValueError, match=f"^actor.strategy={engine}: expected fsdp or fsdp2 with model_engine=dp"):
        checked("steer_exp", f"{ACTOR}.strategy={engine}")


@pytest.mark.parametrize(
    "engine, sizes, ranks",
    [
        ("dp", ["ulysses_sequence_parallel_size=2"], 4),
        ("dp", ["fsdp_config.ulysses_sequence_parallel_size=2"], 4),
        ("dp", ["fsdp_config.ulysses_sequence_parallel_size=2", "ulysses_sequence_parallel_size=2"], 4),
        (
            "megatron",
            [f"megatron.{kind}_parallel_size=2" for kind in ("tensor_model", "pipeline_model", "context")],
            1,
        ),
        ("veomni", ["veomni.ulysses_parallel_size=4"], 2),
        ("torchtitan", ["torchtitan.tensor_parallel_size=4", "torchtitan.pipeline_parallel_size=2"], 1),
    ],
)
def test_ranks_that_share_a_rollout_count_as_one(engine, sizes, ranks):
    """512 prompts of 8 rollouts: 8192 does not divide a rank's, and the message has their number."""
    overrides = [f"{ACTOR}.{size}" for size in sizes]
    with pytest.raises(ValueError, match=f"expected a divisor of the {4096 // ranks} rollouts of a rank .* {ranks} ra"):
        checked(
            "steer_exp", f"model_engine={engine}", *overrides,
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8192",
        )  # fmt: skip


def test_a_dynamic_micro_batch_has_room_for_the_longest_rollout_on_the_ranks_that_share_it():
    """Of 1024 and 3072 tokens."""
    dynamic = [f"{ACTOR}.use_dynamic_bsz=true", f"{ACTOR}.ulysses_sequence_parallel_size=2"]
    checked("steer_exp", *dynamic, f"{ACTOR}.ppo_max_token_len_per_gpu=2048")
    with pytest.raises(ValueError, match="^actor.ppo_max_token_len_per_gpu=2047: expected at least 2048, for rollouts"):
        checked("steer_exp", *dynamic, f"{ACTOR}.ppo_max_token_len_per_gpu=2047")


def test_two_sizes_of_the_ranks_that_share_a_rollout_are_refused():
    sizes = (f"{ACTOR}.ulysses_sequence_parallel_size=2", f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=4")
    with pytest.raises(ValueError, match="^actor.ulysses_sequence_parallel_size=2: expected 4, actor.fsdp_config.uly"):
        checked("grpo", *sizes)


@pytest.mark.parametrize(
    "engine, size",
    [
        ("dp", "ulysses_sequence_parallel_size=3"),
        ("veomni", "veomni.ulysses_parallel_size=16"),
    ],
)
def test_ranks_that_share_a_rollout_divide_the_devices(engine, size):
    message = f"^actor.{size}: expected sizes whose product divides the 8 devices"
    with pytest.raises(ValueError, match=message):
        checked("grpo", f"model_engine={engine}", f"{ACTOR}.{size}")


def test_an_accelerators_platform_is_not_for_a_run_on_the_cpu():
    with pytest.raises(ValueError, match="^trainer.device=cpu: verl's platform here is cuda; expected VERL_PLATFORM=c"):
        checked("grpo", "hardware=cpu")


@pytest.mark.parametrize("build", ["cuda", "hip"])
def test_the_cpu_is_no_platform_for_an_accelerators_torch(monkeypatch, build):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert PlatformCPU().is_platform_available()
    monkeypatch.setattr(torch.version, build, "13.0")
    assert not PlatformCPU().is_platform_available()


# The CPUs of Ray.

UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"


def test_what_verls_actors_reserve():
    """The numbers behind the counts below."""
    for actor in (SimpleStorageUnit, TransferQueueController, RewardComputeWorker):
        assert actor._default_options["num_cpus"] == 1
    assert ray_resources.ResourcePoolManager.max_colocate_count == 3
    assert not TaskRunnerV1._default_options.get("num_cpus")


@pytest.mark.parametrize(
    "overrides, needed",
    [
        (["hardware=gpu8"], 8 * 3 + 4 + 1 + 1),
        (["hardware=gpu1"], 3 + 1 + 1 + 1),
        (["hardware=gpu8", f"{UNITS}=8"], 8 * 3 + 8 + 1 + 1),
        (["hardware=gpu8", "trainer.nnodes=2"], 16 * 3 + 4 + 1 + 1),
        (["hardware=gpu8", "transfer_queue.backend.storage_backend=MooncakeStore"], 8 * 3 + 1 + 1),
        (["hardware=gpu8", "trainer.use_v1=false"], 8 * 3 + 1),
        (["hardware=gpu1", "reward.reward_manager.name=remote", "reward.num_workers=3"], 3 + 1 + 1 + 9 + 1),
        (
            ["hardware=gpu1", "reward.reward_model.enable_resource_pool=true", "reward.reward_model.nnodes=1"]
            + ["reward.reward_model.n_gpus_per_node=2"],
            (1 + 2) * 3 + 1 + 1 + 1,
        ),
        (
            ["hardware=gpu1", "distillation.enabled=true", "distillation.nnodes=1", "distillation.n_gpus_per_node=4"],
            (1 + 4) * 3 + 1 + 1 + 1,
        ),
        (
            ["hardware=gpu1", "trainer.v1.trainer_mode=separate_async", "actor_rollout_ref.rollout.nnodes=1"]
            + ["actor_rollout_ref.rollout.n_gpus_per_node=4"],
            3 + 4 * 2 + 1 + 1 + 1,
        ),
    ],
)
def test_the_cpus_of_a_run_are_counted(monkeypatch, overrides, needed):
    config = resolved("grpo", *overrides, "trainer.save_after=0")
    assert sum(ray_resources.reserved_cpus(config).values()) == needed
    for has in (needed - 1, needed):
        monkeypatch.setattr(ray_resources, "get_num_cpus", lambda _, has=has: has)
        given = resolved("grpo", *overrides, f"ray_kwargs.ray_init.num_cpus={has}")
        for one, said in ((config, "null"), (given, has)):
            if has == needed:
                ray_resources.check_cpus(one)
            else:
                message = f"^ray_kwargs.ray_init.num_cpus={said}: Ray would have {has} CPUs, .* least {needed}: .*\\Z"
                with pytest.raises(ValueError, match=message):
                    ray_resources.check_cpus(one)


def test_too_few_cpus_end_a_run_before_its_other_checks():
    message = "expected at least 34: 24 for trainer.n_gpus_per_node=8 on 1 node(s), 8 for transfer_queue.backend"
    with pytest.raises(ValueError, match=re.escape(message)):
        checked("steer_exp", f"{UNITS}=8")
    checked("steer_exp")


SEPARATE = ["trainer.v1.trainer_mode=separate_async", "actor_rollout_ref.rollout.nnodes=1"]
ALLOWED = ["data.train_batch_size=128", "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl"]
REWARD_POOL = ["reward.reward_model.enable_resource_pool=true", "reward.reward_model.nnodes=1"]


@pytest.mark.parametrize(
    "has, overrides, named",
    [
        (8, [], None),
        (7, [], "trainer.n_gpus_per_node=8 on 1 node(s)"),
        (8, ["trainer.nnodes=2"], "trainer.n_gpus_per_node=8 on 2 node(s)"),
        (7, ["+ray_kwargs.ray_init.num_gpus=8"], None),
        (8, ["+ray_kwargs.ray_init.num_gpus=4"], "trainer.n_gpus_per_node=8 on 1 node(s)"),
        (8, ["trainer.n_gpus_per_node=4", *SEPARATE], None),
        (7, ["trainer.n_gpus_per_node=4", *SEPARATE], "trainer.n_gpus_per_node=4 on 1 node(s), rollout.n_gpus_per_"),
        (8, [*REWARD_POOL, "reward.reward_model.n_gpus_per_node=1"], "trainer.n_gpus_per_node=8 on 1 node(s), reward"),
        (0, ["hardware=cpu"], None),
        (0, ["+ray_kwargs.ray_init.address=auto"], None),
    ],
)
def test_a_run_has_the_gpus_that_it_asks_for(monkeypatch, has, overrides, named):
    monkeypatch.setattr(ray_resources.torch.cuda, "device_count", lambda: has)
    config = resolved("grpo", *overrides)
    if named is None:
        ray_resources.check_gpus(config)
        return
    with pytest.raises(
        ValueError, match="^" + re.escape(named) + ".*: expected at most [4-8] GPUs, those of this mach"
    ):
        ray_resources.check_gpus(config)


def test_fsdps_own_offloading_is_that_of_fsdp2():
    offload = "actor_rollout_ref.actor.fsdp_config.offload_policy=true"
    with pytest.raises(ValueError, match="^actor.fsdp_config.offload_policy=True: expected actor.strategy=fsdp2 with"):
        checked("grpo", offload)
    checked("grpo", offload, "actor_rollout_ref.actor.strategy=fsdp2")


def test_servers_with_devices_of_their_own_need_not_divide_the_trainers():
    size = "actor_rollout_ref.rollout.tensor_model_parallel_size=3"
    check_servers(resolved("grpo", *SEPARATE, *ALLOWED, size))
    with pytest.raises(ValueError, match="expected sizes whose product divides the 8 devices"):
        check_servers(resolved("grpo", size))


def test_a_running_rays_cpus_are_not_this_machines(monkeypatch):
    monkeypatch.setattr(ray_resources, "get_num_cpus", lambda _: 2)
    checked("steer_exp", "+ray_kwargs.ray_init.address=auto")
    with pytest.raises(ValueError, match="num_cpus=null: Ray would have 2 CPUs"):
        checked("steer_exp", "+ray_kwargs.ray_init.address=local")
    monkeypatch.setattr(ray_resources.services, "canonicalize_bootstrap_address", lambda _: "10.0.0.1:6379")
    checked("steer_exp")


def test_a_run_that_joins_a_ray_has_no_options_of_its_own_ray():
    """Ray refuses them beside an address; the others stay."""
    kept, own = {"include_dashboard", "runtime_env"}, {"num_cpus", "num_gpus", "_system_config"}
    for address, expected in (("auto", kept), ("local", kept | own)):
        config = resolved("steer_exp", "hardware=cpu", f"+ray_kwargs.ray_init.address={address}")
        ray_resources.check_cpus(config)
        assert config.ray_kwargs.ray_init.keys() == expected | {"address"}


def test_the_laptop_reserves_no_more_than_it_says():
    config = resolved("grpo", "hardware=cpu")
    assert sum(ray_resources.reserved_cpus(config).values()) == 6 <= config.ray_kwargs.ray_init.num_cpus
    config = resolved("grpo", "hardware=cpu", "trainer.n_gpus_per_node=5")
    with pytest.raises(ValueError, match="num_cpus=16: Ray would have 16 CPUs, .* at least 18: 15 for trainer.n_gpus"):
        ray_resources.check_cpus(config)


@pytest.mark.parametrize("has, told", [(5, "Ray has 5 CPUs: the run waits until it has 6: 3 for "), (6, "")])
def test_a_running_ray_with_too_few_cpus_is_told_of(monkeypatch, has, told):
    found = []
    monkeypatch.setattr(ray_resources.logger, "warning", lambda text, *values: found.append(text % values))
    monkeypatch.setattr(ray_resources.ray, "cluster_resources", lambda: {"CPU": float(has)})
    ray_resources.warn_of_few_cpus(resolved("grpo", "hardware=cpu"))
    assert [one[: len(told)] for one in found] == [told][: bool(told)]
