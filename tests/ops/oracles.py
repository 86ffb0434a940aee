"""The recurrences token by token, straight from the formulas. They share no code with `statecache.ops`."""

import torch
from torch import Tensor


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool) -> Tensor:
    """Outputs (B, T, C) of x (B, T, C), weight (C, W), past (B, C, W-1)."""
    width = weight.shape[1]
    zeros = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype)
    inputs = [zeros if past is None else past[..., w] for w in range(width - 1)] + list(x.unbind(1))
    outputs = []
    for t in range(x.shape[1]):
        y = sum(inputs[t + w] * weight[:, w] for w in range(width))
        y = y if bias is None else y + bias
        outputs.append(y * torch.sigmoid(y) if silu else y)
    return torch.stack(outputs, 1) if outputs else x.clone()


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, G, P) and the T+1 states (B, G, P, N)."""
    states, outputs = [state], []
    for t in range(x.shape[1]):
        decay = torch.exp(torch.einsum("bgp,gpn->bgpn", dt[:, t], A))
        state = decay * state + torch.einsum("bgp,bgn->bgpn", dt[:, t] * x[:, t], B[:, t])
        states.append(state)
        outputs.append(torch.einsum("bgpn,bgn->bgp", state, C[:, t]))
    return torch.stack(outputs, 1) if outputs else x.clone(), states


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, H, P) and the T+1 states (B, H, P, N)."""
    group = [h // (x.shape[2] // B.shape[2]) for h in range(x.shape[2])]
    states, outputs = [state], []
    for t in range(x.shape[1]):
        new = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t, group])
        state = torch.exp(dt[:, t] * A)[:, :, None, None] * state + new
        states.append(state)
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t, group]))
    return torch.stack(outputs, 1) if outputs else x.clone(), states


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, H, V) and the T+1 states (B, H, K, V)."""
    head = [h // (v.shape[2] // k.shape[2]) for h in range(v.shape[2])]
    q, k = ((a / (a.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt())[:, :, head] for a in (q, k))
    states, outputs = [state], []
    for t in range(v.shape[1]):
        state = torch.exp(g[:, t])[:, :, None, None] * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bh,bhv->bhkv", k[:, t], beta[:, t], error)
        states.append(state)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / q.shape[-1] ** 0.5)
    return torch.stack(outputs, 1) if outputs else v.clone(), states


def lightning(
    q: Tensor, k: Tensor, v: Tensor, alive: Tensor, slope: Tensor, state: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, H, D) and the T+1 states (B, H, D, D); a token that is not alive changes nothing."""
    states, outputs = [state], []
    for t in range(v.shape[1]):
        gate = alive.reshape(*v.shape[:2])[:, t, None, None, None].to(v.dtype)
        moved = torch.exp(-slope)[:, None, None] * state + torch.einsum("bhd,bhe->bhde", v[:, t], k[:, t])
        state = gate * moved + (1 - gate) * state
        states.append(state)
        outputs.append(torch.einsum("bhde,bhe->bhd", state, q[:, t]))
    return torch.stack(outputs, 1) if outputs else v.clone(), states
