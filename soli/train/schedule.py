"""What changes during a run, as pure functions of the tokens seen so far: learning rate, gamma, lambda (section 4.2).

Counting tokens, not steps, keeps the curve where it is when the batch changes. The value at `tokens` holds for the step
that starts there.
"""

import math

from soli.train.settings import BalanceSettings, LossSettings, ScheduleSettings


def learning_rate(schedule: ScheduleSettings, tokens: int) -> float:
    """Rate of the step that starts after `tokens` tokens: linear warm-up, constant, cosine to the final rate, tails.

    Warm-up counts the step's own tokens, so the first step does not stand still. Past the end the last phase holds.
    """
    peak, final = schedule.learning_rate, schedule.final_learning_rate
    if tokens < schedule.warmup_tokens:
        return peak * min(1.0, (tokens + schedule.batch_tokens) / schedule.warmup_tokens)
    tokens -= schedule.warmup_tokens + schedule.constant_tokens
    if tokens < 0:
        return peak
    if tokens < schedule.cosine_tokens:
        return final + (peak - final) * (1 + math.cos(math.pi * tokens / schedule.cosine_tokens)) / 2
    tokens -= schedule.cosine_tokens
    rate = final if schedule.cosine_tokens else peak
    for length, tail_rate in schedule.tails:
        rate = tail_rate
        if tokens < length:
            break
        tokens -= int(length)
    return rate


def bias_speed(balance: BalanceSettings, tokens: int) -> float:
    """Gamma, and 0 from `gamma_tokens` on."""
    ended = balance.gamma_tokens is not None and tokens >= balance.gamma_tokens
    return 0.0 if ended else balance.gamma


def mtp_weight(losses: LossSettings, tokens: int) -> float:
    """Lambda: `mtp_weight`, and `mtp_weight_late` from `mtp_late_after_tokens` on."""
    late = losses.mtp_late_after_tokens is not None and tokens >= losses.mtp_late_after_tokens
    return losses.mtp_weight_late if late else losses.mtp_weight
