"""The loss of preference optimization."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.config.parts.checks import choice, not_negative, positive

__all__ = ["PREFERENCE_LOSSES", "Preferences"]

PREFERENCE_LOSSES = ("dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")


@dataclass
class Preferences:
    """The loss of preference pairs: DPO, IPO and RPO.

    Attributes:
        loss: "dpo" (arXiv 2305.18290), "ipo" (arXiv 2310.12036), or RPO's (arXiv 2406.11704, section 3.3.3) "rpo_sq",
            "rpo_bwd_kl" and "rpo_fwd_kl".
        beta: NeMo-Aligner's ``ref_policy_kl_penalty``; the tau of IPO.
        reward_scale: RPO's eta, the factor of the reward gap.
        preference_loss_weight: weight of the preference loss.
        sft_loss_weight: weight of the chosen answer's negative log-likelihood.
        preference_average_log_probs, sft_average_log_probs: in that loss, divide an answer's log-probability by its
            length.
    """

    loss: str = "dpo"
    beta: float = 0.1
    reward_scale: float = 1.0
    preference_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0
    preference_average_log_probs: bool = False
    sft_average_log_probs: bool = False

    def faults(self) -> list[str]:
        """Unknown losses, weights that leave no loss."""
        faults = [
            *choice(self, "loss", PREFERENCE_LOSSES),
            *positive(self, "beta", "reward_scale"),
            *not_negative(self, "preference_loss_weight", "sft_loss_weight"),
        ]
        if self.preference_loss_weight == 0 and self.sft_loss_weight == 0:
            faults.append("preference_loss_weight and sft_loss_weight are both 0: no loss is left")
        return faults
