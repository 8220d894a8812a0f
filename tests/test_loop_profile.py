# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/loop_profile.py`: a step's seconds in calls of the processes, from Ray's timeline."""

import json

import pytest


@pytest.fixture
def step_calls(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    from loop_profile import step_calls

    return step_calls


def event(name, start, seconds, category="task::"):
    return {"cat": category + name, "ts": start * 1e6, "dur": seconds * 1e6}


def update(start):
    return event("WorkerDict.actor_rollout_update_actor", start, 1.0)


def test_seconds_of_a_step_in_calls(tmp_path, step_calls):
    timeline = tmp_path / "timeline.json"
    timeline.write_text(
        json.dumps(
            [
                event("VLLMServerActor.generate_batch", 0, 9),  # the first step, which warms up
                update(9),
                event("VLLMServerActor.generate_batch", 10, 3),
                event("vLLMHttpServer.generate", 11, 3),  # overlaps by 2 s: 4 s together
                event("vLLMHttpServer.generate", 11.5, 1),  # inside the others
                event("Server.sleep", 14, 0.004),  # too short for a row
                update(15),
                event("vLLMHttpServer.generate", 16, 2),
                event("Reward.score", 18, 1),
                update(19),
                event("vLLMHttpServer.generate", 20, 3),
                event("Reward.score", 23, 3),
                event("generate", 23, 3, category="submit_"),
                update(26),
                event("vLLMHttpServer.generate", 27, 50),  # after the last update
            ]
        )
    )
    assert step_calls(timeline) == {
        "generation": pytest.approx(3),
        "Reward.score": pytest.approx(1),
        "updates": pytest.approx(1),
    }
