"""GFlowNet objectives: pure functions of the log importance weights, and the records that training uses.

    log_w[b, t] = log R(z_1:t) - sum_{k<=t} log q(z_k | z_<k) - log q(stop | z_1:t)

At q = R / Z every entry is log Z, so every objective and its gradient are zero (the gradient of forward_kl on draws
of the posterior: zero on average). Each takes log_w [B, T+1] and stop_mask [B, T+1] (entries outside are
ignored) and returns (loss, metrics): a scalar and a dict of floats. Losses are means over trajectories or groups, so a
batch split evenly over processes has the gradient of the whole. An objective never sees a model, a tokenizer or a task.

To add an objective, write its function (`formulas.py`), and a record (`Objective`) with the decorator `register`
(`records.py`).
"""

from amortlm.objectives.formulas import (
    Loss,
    alpha_divergence,
    db,
    final_log_w,
    forward_kl,
    group_log_mean_exp,
    log_weights,
    prefix_tb,
    spread,
    subsample_states,
    subtb,
    tb,
    vargrad,
    with_root,
)
from amortlm.objectives.records import (
    DB,
    OBJECTIVES,
    TB,
    Alpha,
    ForwardKL,
    LossInputs,
    Objective,
    PrefixTB,
    SubTB,
    VarGrad,
    parse,
    register,
)

__all__ = [
    "Alpha",
    "DB",
    "ForwardKL",
    "Loss",
    "LossInputs",
    "OBJECTIVES",
    "Objective",
    "PrefixTB",
    "SubTB",
    "TB",
    "VarGrad",
    "alpha_divergence",
    "db",
    "final_log_w",
    "forward_kl",
    "group_log_mean_exp",
    "log_weights",
    "parse",
    "prefix_tb",
    "register",
    "spread",
    "subsample_states",
    "subtb",
    "tb",
    "vargrad",
    "with_root",
]
