# SPDX-License-Identifier: Apache-2.0
"""An entropy audit of a policy whose entropy after an update can be computed exactly: a softmax over a table."""

import pandas as pd
import torch
from verl.trainer.ppo.core_algos import (
    ClipRatios,
    LossInputs,
    compute_token_weights,
    estimate_entropy_change,
    ppo_clipped,
)

WORDS = ("So ", "the ", "answer", " is", " 4", "2", ".\n", "wait", ",", " <b>", "&amp;", " $x$")
LEARNING_RATE, CLIP = 0.05, ClipRatios(0.2, 0.28, 10.0)


def entropy_of(logits):
    log_prob = logits.log_softmax(-1)
    return -(log_prob.exp() * log_prob).sum(-1)


def tabular_audit(steps=(1, 2), mini_batches=2, responses=6, length=30, linear=False, seed=0, words=WORDS):
    """Columns of the audit, one row a token; each token has a state of its own, so that changes don't mix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    frames = []
    for step in steps:
        for mini_batch in range(mini_batches):
            shape = (responses, length)
            old_logits = 2 * normal(*shape, 1).abs() * normal(*shape, len(words))
            logits = (old_logits + 0.2 * normal(*shape, len(words))).requires_grad_()
            flat = torch.multinomial(old_logits.softmax(-1).flatten(0, 1), 1, generator=generator)
            tokens = flat.view(*shape, 1)
            old_log_prob = old_logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)
            log_prob = logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)
            advantages = normal(responses, 1).expand(shape)
            mask = torch.ones(shape, dtype=torch.bool)
            with torch.no_grad():
                entropy = entropy_of(logits)
                scored = (advantages, entropy, old_log_prob, log_prob)
                inputs = LossInputs(old_log_prob, log_prob, advantages, mask, entropy)
                clipped = torch.logical_or(*ppo_clipped(inputs, CLIP))
                estimates = {
                    f"omega_{name}": estimate_entropy_change(inputs, name, CLIP)
                    for name in ("released", "clip_aware", "squared")
                }
                weights = compute_token_weights(*scored, mask, 0.8, 1.2 if linear else 1.0, linear)
            (gradient,) = torch.autograd.grad(
                ((log_prob - old_log_prob).exp() * advantages * ~clipped * weights).sum(), logits
            )
            with torch.no_grad():
                change = entropy_of(logits + LEARNING_RATE * gradient) - entropy
                prob, ratio = log_prob.exp(), (log_prob - old_log_prob).exp()
                probs = logits.softmax(-1)
                # docs: the first-order change of a softmax with independent logits, for one sampled action
                inner = probs.square() * (probs.log() + entropy[..., None])
                estimates["omega_exact"] = -(~clipped * ratio * advantages) * (
                    prob * (log_prob + entropy) - inner.sum(-1)
                )
                # arXiv 2505.22617: the entropy falls with the covariance of log-probability and advantage
                centred = (log_prob - log_prob.mean()) * (advantages - advantages.mean())
                estimates["omega_covariance"] = -centred
            columns = {
                "step": torch.full(shape, step),
                "mini_batch": torch.full(shape, mini_batch),
                "token_id": tokens.squeeze(-1),
                "response": (torch.arange(responses) + mini_batch * responses)[:, None].expand(shape),
                "position": torch.arange(length).expand(shape),
                **{"prob": prob, "entropy": entropy, "advantage": advantages, "ratio": ratio, "clipped": clipped},
                **estimates,
                **{"weight": weights, "true_change": change},
            }
            frames.append(pd.DataFrame({name: value.detach().flatten().numpy() for name, value in columns.items()}))
    audit = pd.concat(frames, ignore_index=True)
    audit.insert(3, "text", [words[token] for token in audit["token_id"]])
    return audit
