# SPDX-License-Identifier: Apache-2.0
"""`adv_estimator=aepo`: which prompts are tempered, and the advantages of their answers, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from configurations import MANAGER, validated
from omegaconf import OmegaConf
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from test_batched_rollouts import PROMPTS, ROLLOUTS, prompts, run  # noqa: F401 - a fixture
from test_interventions import advantages_of, registered_estimators  # noqa: F401 - a fixture
from verl.steer import trainer as trainer_steer
from verl.steer.methods.aepo import AEPOOptions, Tempering
from verl.steer.rollout.checks import TEMPERATURE
from verl.steer.trainer import SteerTrainer
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

OPTIONS = AEPOOptions(aepo_entropy=0.5, aepo_temperature_high=1.5, aepo_temperature_low=0.6, aepo_share=0.25)


def test_a_whole_number_of_tempered_prompts_is_not_rounded():
    assert AEPOOptions(aepo_share=0.07).tempered(None, 100, 100)[0] == 7
    assert AEPOOptions(aepo_share=0.29).tempered(None, 50, 100)[0] == 29  # the product is 28.999999999999996


@pytest.mark.parametrize(
    "entropy, prompts_of_batch, expected",
    [
        (None, 8, (2, 1.5)),
        (0.4, 8, (2, 1.5)),
        (0.5, 8, (2, 1.5)),
        (0.6, 8, (1, 0.6)),
        (0.4, 6, (2, 1.5)),
        (0.6, 6, (1, 0.6)),
    ],
)
def test_tempered_prompts_by_hand(entropy, prompts_of_batch, expected):
    """A quarter of the prompts, or an eighth above the entropy 0.5, rounded up."""
    assert OPTIONS.tempered(entropy, prompts_of_batch, prompts_of_batch) == expected


@pytest.mark.parametrize("further, expected", [(1, 2), (2, 2), (5, 2), (6, 3), (9, 3), (10, 4)])
def test_tempered_prompts_among_those_that_replace_others(further, expected):
    """A quarter of 6 is rounded up to 2, a quarter of all is rounded down."""
    assert OPTIONS.tempered(None, 6, 6 + further) == (expected, 1.5)


def test_advantages_by_hand():
    """Prompt b is tempered: its right answers have 1, its wrong one 0; c is too, and all its answers are right."""
    rewards = [1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0], [1, 1], [1, 1], [1, 0]])
    config = {"norm_adv_by_std_in_grpo": False}
    found = advantages_of("aepo", rewards, mask, list("aabbbcc"), config, tempered=("b", "c"))
    expected = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(found, expected[:, None] * mask)
    plain = advantages_of("aepo", rewards, mask, list("aabbbcc"), config)
    torch.testing.assert_close(plain[2:5, 0], torch.tensor([2 / 3, 2 / 3, -4 / 3]))


def test_an_answer_hardly_better_than_the_others_does_not_count():
    """Of two tempered prompts: advantages of 0.04 and -0.04, and of 0.06 and -0.06."""
    config = {"norm_adv_by_std_in_grpo": False}
    found = advantages_of("aepo", [0.58, 0.5, 0.62, 0.5], torch.ones(4, 1), list("aabb"), config, tempered=("a", "b"))
    assert found.flatten().tolist() == [0.0, 0.0, 1.0, 0.0]


def test_from_submission_to_advantages(monkeypatch):
    """The first prompts get their temperature, their answers the advantages of REINFORCE, once.

    The low temperature is for a quarter of the prompts: of four, of four more that replace them, and of a ninth.
    """
    trainer, submitted, advantages = SteerTrainer.__new__(SteerTrainer), [], []
    trainer.config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "aepo", "aepo_share": 0.5, "norm_adv_by_std_in_grpo": False},
            "actor_rollout_ref": {"rollout": {"n": 2, "temperature": 0.9}},
            "data": {"train_batch_size": 4},
        }
    )
    trainer.rollouts_asked, trainer.tempering, trainer.last_entropy = {}, Tempering(trainer.config), 0.7
    trainer.global_steps = trainer.total_training_steps = 1

    def compute(self, batch, metrics):
        advantages.append(
            get_adv_estimator_fn("aepo")(
                token_level_rewards=torch.tensor([[1.0], [-1.0]] * 4),
                response_mask=torch.ones(8, 1),
                index=np.repeat(np.array([f"uid{i}" for i in range(4)], dtype=object), 2),
                config=self.config.algorithm,
            )[0][:, 0].tolist()
        )
        return batch

    upstream = trainer_steer.PPOTrainerSync
    monkeypatch.setattr(upstream, "_submit_batch_to_rollout", lambda self, batch: submitted.append(batch) or len(batch))
    monkeypatch.setattr(upstream, "_compute_advantage", compute)
    for uids in (["uid0", "uid1", "uid2", "uid3"], ["other0", "other1", "other2", "other3"], ["other4"]):
        trainer._submit_batch_to_rollout(TensorDict({"uid": NonTensorStack(*uids)}, batch_size=len(uids)))
    for found, temperatures in zip(submitted, ([0.8, 0.9, 0.9, 0.9], [0.8, 0.9, 0.9, 0.9], [0.9]), strict=True):
        torch.testing.assert_close(found[TEMPERATURE], torch.tensor(temperatures))
    metrics = [{}, {}]
    batch = SimpleNamespace(keys=[f"uid{i}_{j}_0" for i in range(4) for j in range(2)], partition_id="train")
    for one in metrics:
        trainer._compute_advantage(batch, one)
    assert advantages == [[1.0, 0.0] + [1.0, -1.0] * 3, [1.0, -1.0] * 4]
    # Of the two tempered prompts one is in the batch.
    assert metrics[0] == {"training/tempered_prompts": 1, "training/temperature": pytest.approx(0.8)}
    assert metrics[1] == {"training/tempered_prompts": 0, "training/temperature": 0.0}


def test_the_batched_manager_samples_at_the_temperature(run):  # noqa: F811
    temperatures = torch.linspace(0.5, 1.5, PROMPTS)
    queue, manager = run(batch=prompts(**{TEMPERATURE: temperatures}))
    found = [params["temperature"] for params in manager.llm_client.params]
    assert found == pytest.approx(temperatures.repeat_interleave(ROLLOUTS).tolist())
    assert all(TEMPERATURE not in row for row in queue.rows.values())
    _, manager = run()
    assert len({params["temperature"] for params in manager.llm_client.params}) == 1


def test_another_manager_is_refused():
    with pytest.raises(
        ValueError, match="agent_loop_manager_class=None: expected .*BatchedAgentLoopManager with algori"
    ):
        validated("aepo", f"{MANAGER}=null")
