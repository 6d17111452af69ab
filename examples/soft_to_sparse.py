"""From the textbook mixture of experts to DeepSeek-V3's, one change at a time, on Soli's own router and dispatch.

`docs/from-soft-to-sparse.md` walks through this file. Run it: `python examples/soft_to_sparse.py`.
Shapes: T tokens, D input width, N output width, E experts, K chosen, P = T*K pairs of token and expert.
"""

import torch
from torch import Tensor, nn

from soli.config import ModelConfig
from soli.kernels.torch_backend import dispatch_and_combine
from soli.model.moe import MoE
from soli.model.router import Router, Routing


class Textbook(nn.Module):
    """Step 0: a softmax gate, linear-ReLU experts, every expert computed for every token."""

    def __init__(self, D: int, N: int, E: int) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(D, N) for _ in range(E))

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TE = self.gate(x_TD).softmax(dim=-1)
        y_TEN = torch.stack([expert(x_TD).relu() for expert in self.experts], dim=1)
        return (gate_TE[..., None] * y_TEN).sum(dim=1)


class Sparse(nn.Module):
    """The textbook's gate and experts behind Soli's router and dispatch; the fields are ModelConfig's."""

    def __init__(self, textbook: Textbook, **fields: object) -> None:
        super().__init__()
        E, D = textbook.gate.weight.shape
        self.gate = Router(ModelConfig(hidden_size=D, n_routed_experts=E, **fields), None, None)
        self.gate.weight = textbook.gate.weight
        self.experts = textbook.experts

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        routing = self.gate(x_TD)
        E = len(self.experts)
        return dispatch_and_combine(x_TD, routing.expert_ids_TK, routing.weights_TK, E, self.run), routing

    def run(self, x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor) -> Tensor:
        runs = zip(self.experts, x_PD.split(counts_E.tolist()), strict=True)
        return weights_P1 * torch.cat([expert(rows_PD).relu() for expert, rows_PD in runs])


PLAIN = {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
SOFTMAX = PLAIN | {"scoring_func": "softmax", "topk_method": "greedy"}
ALL_OF_4 = SOFTMAX | {"num_experts_per_tok": 4}


def in_textbook_order(layer: Sparse, x_TD: Tensor) -> Tensor:
    """Step 1: the same layer, its sum taken from expert 0 up instead of from the best expert down."""
    routing = layer.gate(x_TD)
    ids_TK, places_TK = routing.expert_ids_TK.sort(dim=-1)
    weights_TK = routing.weights_TK.gather(1, places_TK)
    return dispatch_and_combine(x_TD, ids_TK, weights_TK, len(layer.experts), layer.run)


TOP_2 = SOFTMAX | {"num_experts_per_tok": 2}
SIGMOID = TOP_2 | {"scoring_func": "sigmoid", "norm_topk_prob": True}


class WithShared(Sparse):
    """Step 4: one more expert that every token uses, outside the gate."""

    def __init__(self, textbook: Textbook, shared: nn.Linear, **fields: object) -> None:
        super().__init__(textbook, **fields)
        self.shared = shared

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        y_TN, routing = super().forward(x_TD)
        return y_TN + self.shared(x_TD).relu(), routing


BIASED = SIGMOID | {"topk_method": "noaux_tc"}


@torch.no_grad()
def balance(router: Router, x_TD: Tensor, steps: int, gamma: float = 0.001) -> None:
    """Step 5: after each batch, an overloaded expert's bias goes down by gamma, an underloaded one's up."""
    for _ in range(steps):
        load_E = router(x_TD).counts_E().float()
        router.e_score_correction_bias += gamma * torch.sign(load_E.mean() - load_E)


def fine_grained(D: int, E: int, K: int, F: int, cut: int, **fields: object) -> MoE:
    """Step 6: each expert, F wide, cut into `cut` narrower ones and `cut` times as many chosen: Soli's own layer."""
    small = {"n_routed_experts": E * cut, "num_experts_per_tok": K * cut, "moe_intermediate_size": F // cut}
    layer = MoE(ModelConfig(hidden_size=D, n_shared_experts=cut, **(small | fields)), None, None)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return layer


@torch.no_grad()
def inside_moe(textbook: Textbook, slope: float = 2.0**40) -> MoE:
    """The way back: the textbook's weights in an unchanged MoE layer, whose input has a 1 in column D."""
    E, D = textbook.gate.weight.shape
    N = textbook.experts[0].out_features
    shape = {"hidden_size": D + 1, "n_routed_experts": E, "moe_intermediate_size": N, "n_shared_experts": 0}
    layer = MoE(ModelConfig(**(ALL_OF_4 | shape | {"num_experts_per_tok": E})), None, None)
    for weight in layer.parameters():
        weight.zero_()
    layer.gate.weight[:, :D] = textbook.gate.weight
    for e, expert in enumerate(textbook.experts):
        gate_FD, up_FD = layer.experts.gate_up_proj[e].chunk(2)
        gate_FD[:, :D], gate_FD[:, D] = expert.weight * slope, expert.bias * slope
        up_FD[:, D] = 1
        layer.experts.down_proj[e, :N] = torch.eye(N) / slope
    return layer


def total(layer: nn.Module) -> int:
    """Parameters of the layer, the balancing bias included."""
    return sum(t.numel() for t in (*layer.parameters(), *layer.buffers()))


def activated(layer: nn.Module) -> int:
    """Parameters that one token uses: all of the layer's, less its routed experts that were not chosen."""
    E = layer.gate.weight.shape[0]
    K = layer.gate.K if isinstance(layer.gate, Router) else E
    return total(layer) - sum(p.numel() for p in layer.experts.parameters()) * (E - K) // E


def gates(routing: Routing) -> Tensor:
    """The chosen experts' weights put back in their columns, (T, E)."""
    return torch.zeros_like(routing.scores_TE).scatter(1, routing.expert_ids_TK, routing.weights_TK)


def heading(step: int, name: str, layer: nn.Module) -> None:
    print(f"\n{step}  {name:<42} parameters {total(layer):>5,}   activated {activated(layer):>5,}")


def show_gates(gate_TE: Tensor, y_TN: Tensor) -> None:
    """A line per token: each expert's gate (a dot where it is not selected), their sum, the output's first values."""
    experts = "".join(f"{f'e{e}':>8}" for e in range(gate_TE.shape[1]))
    print(f"   token{experts}     sum    output")
    for t, (gate_E, y_N) in enumerate(zip(gate_TE.tolist(), y_TN.tolist(), strict=True)):
        columns = "".join(f"{g:8.3f}" if g else f"{'.':>8}" for g in gate_E)
        print(f"   {t:>5}{columns}{sum(gate_E):8.3f}  " + "".join(f"{y:7.3f}" for y in y_N[:3]) + " ...")


def show_load(name: str, router: Router, x_TD: Tensor) -> None:
    load_E = router(x_TD).counts_E()
    violation = load_E.max() / load_E.float().mean() - 1
    print(f"   {name:<12}" + "".join(f"{n:8}" for n in load_E.tolist()) + f"    max violation {violation:.3f}")


def toy(seed: int = 0) -> tuple[Textbook, nn.Linear, Tensor]:
    """The textbook's size: 4 experts, a 5 x 16 input, a 5 x 8 output; and a spare expert to share."""
    torch.manual_seed(seed)
    return Textbook(16, 8, 4), nn.Linear(16, 8), torch.randn(5, 16)


def skewed(textbook: Textbook, T: int = 512) -> Tensor:
    """T tokens that lean towards expert 0 and away from expert 3."""
    lean_D = textbook.gate.weight[0] - textbook.gate.weight[3]
    return torch.randn(T, lean_D.shape[0]) + lean_D


@torch.no_grad()
def main() -> None:
    textbook, shared, x_TD = toy()
    heading(0, "the textbook", textbook)
    show_gates(textbook.gate(x_TD).softmax(dim=-1), textbook(x_TD))
    show_all_by_softmax(Sparse(textbook, **ALL_OF_4), textbook, x_TD)
    for step, name, layer in (
        (2, "top 2 of 4", Sparse(textbook, **TOP_2)),
        (3, "sigmoid gates, normalised", Sparse(textbook, **SIGMOID)),
        (4, "a shared expert", WithShared(textbook, shared, **SIGMOID)),
    ):
        y_TN, routing = layer(x_TD)
        heading(step, name, layer)
        show_gates(gates(routing), y_TN)
    show_balance(WithShared(textbook, shared, **BIASED), skewed(textbook))
    show_moe(fine_grained(D=16, E=4, K=2, F=4, cut=2, n_group=1, topk_group=1), x_TD)
    show_way_back(inside_moe(textbook), textbook, x_TD)


def show_all_by_softmax(layer: Sparse, textbook: Textbook, x_TD: Tensor) -> None:
    heading(1, "all 4 of 4 by Soli's router and dispatch", layer)
    difference = (layer(x_TD)[0] - textbook(x_TD)).abs().max()
    equal = torch.equal(in_textbook_order(layer, x_TD), textbook(x_TD))
    print(f"   summed from the best expert down   largest difference from the textbook {difference:.1e}")
    print(f"   summed from expert 0 up            every bit equal to the textbook: {'yes' if equal else 'no'}")


def show_balance(layer: WithShared, x_TD: Tensor) -> None:
    heading(5, f"the balancing bias, on {len(x_TD)} skewed tokens", layer)
    print(" " * 15 + "".join(f"{f'e{e}':>8}" for e in range(len(layer.experts))))
    show_load("load before", layer.gate, x_TD)
    balance(layer.gate, x_TD, steps=400)
    show_load("load after", layer.gate, x_TD)
    print(f"   {'bias':<12}" + "".join(f"{b:8.3f}" for b in layer.gate.e_score_correction_bias.tolist()))


def show_moe(layer: MoE, x_TD: Tensor) -> None:
    heading(6, "fine-grained SwiGLU experts: Soli's MoE", layer)
    y_BTD, routing = layer(x_TD[None])
    show_gates(gates(routing), y_BTD[0])


def show_way_back(layer: MoE, textbook: Textbook, x_TD: Tensor) -> None:
    heading(7, "and back: the textbook inside Soli's MoE", layer)
    y_TN = textbook(x_TD)
    y_BTD, _ = layer(nn.functional.pad(x_TD, (0, 1), value=1.0)[None])
    print(f"   largest difference from the textbook {(y_BTD[0, :, : y_TN.shape[1]] - y_TN).abs().max():.1e}")


if __name__ == "__main__":
    main()
